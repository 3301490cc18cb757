"""bract's own client as a Flower ClientApp: train and evaluate, with everything that leaves passing the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..core.keys import Key
from ..core.parameters import record_of
from ..privacy.mechanism import RecordLevelPlan
from ..privacy.release import EvaluationPlan, histogram, release
from ..tasks.task import SiteData, Task
from . import sequential
from .gate import Gate, personal_of
from .local_model import LocalModel
from .training import LocalTraining


@dataclass(frozen=True, kw_only=True)
class Site:
    """One data owner: its records, its secret key, and the mechanisms that cover what it releases."""

    name: str
    data: SiteData
    key: Key
    plan: RecordLevelPlan | None
    evaluation: EvaluationPlan


def client_app(
    sites: Mapping[str, Site], task: Task, training: LocalTraining, model: LocalModel, gate: Gate
) -> ClientApp:
    """Return the app that serves these sites with one resident model; `node_config["name"]` says which.

    A site's randomness is keyed by the round, and under privacy also by the model that it was sent: the same round
    with another model draws other batches and other noise, a repeated round with the same model the same ones.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        site = sites[str(context.node_config["name"])]
        model.load(gate.admit(message), personal_of(context.state))
        sequential.train(
            model,
            task.loss,
            site.data.train,
            training,
            plan=site.plan,
            key=_message_key(site, message, "train"),
        )
        reply = gate.release_update(message, model.shared_arrays(), records=len(site.data.train))
        if model.personal:
            context.state["personal"] = record_of(model.personal_arrays())
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site = sites[str(context.node_config["name"])]
        model.load(gate.admit(message), personal_of(context.state))
        probabilities = sequential.predict(model, task.probabilities, site.data.test.inputs)
        counts = histogram(probabilities, site.data.test.targets, site.evaluation)
        key = _message_key(site, message, "evaluate")
        return gate.release_histogram(message, release(counts, site.evaluation, key.stream()))

    return app


def _message_key(site: Site, message: Message, purpose: str) -> Key:
    config: Any = message.content["config"]
    key = site.key.child(purpose, int(config["server-round"]))
    # The same noise over two models' gradients would reveal their difference.
    return key if site.plan is None else key.child(str(config["model-version"]))
