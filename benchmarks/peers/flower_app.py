"""A stock Flower ClientApp: the workload's local training, for Flower's own simulation and for bract's."""

from functools import cache, partial

import torch
import workload
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional as F


@cache
def data(clients: int):
    torch.set_num_threads(1)
    return workload.load()[:2], workload.split(clients)


def client_app(model: str, clients: int = 1000) -> ClientApp:
    """Return the app of one of the workload's models."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (images, labels), parts = data(clients)
        net = workload.model(model)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        mine = torch.from_numpy(parts[context.node_config["partition-id"]])
        optimizer = torch.optim.SGD(net.parameters(), lr=workload.LEARNING_RATE)
        for batch in mine.split(workload.BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(mine)})}
        return Message(content=RecordDict(content), reply_to=message)

    return app


# What an experiment names: `clients.app = "flower_app:mlp"` and `task.model = "flower_app:mlp_model"`.
mlp, small, cnn = client_app("mlp"), client_app("small"), client_app("cnn")
mlp_model, small_model, cnn_model = (partial(workload.model, name) for name in ("mlp", "small", "cnn"))
