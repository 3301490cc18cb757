"""A Flower ClientApp as in Flower's own quickstart, run by bract: bract simulate examples/flower_app.toml"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F

app = ClientApp()


def net():
    return nn.Linear(10, 1)


def load(context: Context):
    """Return this partition's records: a real app would read a file."""
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x = torch.randn(100, 10, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).float()


@app.train()
def train(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = load(context)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(context.run_config["learning-rate"]))
    for _ in range(int(context.run_config["local-epochs"])):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(x).squeeze(1), y)
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(x)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = load(context)
    accuracy = ((model(x).squeeze(1) > 0) == (y > 0)).float().mean().item()
    metrics = MetricRecord({"eval_acc": accuracy, "num-examples": len(x)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
