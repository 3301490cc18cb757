"""bract's own client as a Flower ClientApp: train and evaluate, with everything that leaves passing the gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.keys import Key
from ..core.parameters import Arrays, record_of
from ..privacy.local import LocalPlan
from ..privacy.release import histogram, release
from ..strategies.codec import Encoded
from ..strategies.compression import MEMORY
from ..strategies.local_rule import LocalRound, LocalSession, Sent
from ..tasks.task import Task
from .gate import Gate, kept_of
from .kernels import sequential
from .kernels.kernel import KERNELS
from .local_model import LocalModel
from .owner import Content, Site
from .training import LocalTraining

PERSONAL = "personal"


def client_app(
    sites: Mapping[str, Site], task: Task, training: LocalTraining, model: LocalModel, gate: Gate
) -> ClientApp:
    """Return the app that serves these sites with one resident model; `node_config["name"]` says which.

    Training follows the gate's rule. All of a site's randomness comes from the message's key (`Site.message_key`).
    """
    app = ClientApp()
    rule, by_kernel = gate.rule, KERNELS[training.kernel]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        site = sites[str(context.node_config["name"])]
        shared, received = gate.admit(message), gate.admit_beside(message)
        kept = kept_of(context.state, (PERSONAL, *rule.keeps))
        key = site.message_key("train", _config(message), _contents({"shared": shared, **received}), _contents(kept))
        state = {name: kept[name] for name in rule.keeps if name in kept}
        records = site.data.train
        model.load(shared, kept.get(PERSONAL))

        def loss() -> float:
            _refuse_under_privacy(site, "the loss of its records")
            return sequential.mean_loss(model, task.loss, records)

        def train_again(session: LocalSession) -> None:
            _refuse_under_privacy(site, "training that the privacy plan does not count")
            again = key.child("again")
            sequential.train(model, task.loss, records, training, plan=None, key=again, session=session)

        round = LocalRound(
            shared=model.shared,
            parameters=model.trained,
            personal=model.personal,
            received=received,
            state=state,
            steps=sequential.steps_of(len(records), training, site.plan),
            epochs=training.epochs,
            learning_rate=training.learning_rate,
            momentum=training.momentum,
            loss=loss,
            train=train_again,
        )
        session = rule.session(round)
        by_kernel(model, task.loss, records, training, plan=site.plan, key=key, session=session, hide=site.hide)
        update, personal = model.shared_arrays(), model.personal_arrays()
        if site.local is not None:
            update = _noised(site.local, gate, shared, update, key)
        sent = session.finish()
        beside = Sent(arrays={name: model.beside(arrays) for name, arrays in sent.arrays.items()}, numbers=sent.numbers)
        compressed = _compressed(gate, shared, update, context, key)
        encoded = compressed.records if compressed else None
        reply = gate.release_update(message, update, records=len(records), sent=beside, encoded=encoded)
        for name in sorted(set(state) - set(rule.keeps)):
            raise RunError("strategy-failed", f"the strategy's local rule keeps {name!r}, which it did not declare")
        for name, arrays in {**state, **({PERSONAL: personal} if personal else {})}.items():
            context.state[name] = record_of(arrays)
        if compressed and compressed.memory is not None:
            context.state[MEMORY] = record_of({MEMORY: compressed.memory})
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site = sites[str(context.node_config["name"])]
        if site.evaluation is None:
            raise RunError("metrics-withheld", "metrics are withheld")
        shared = gate.admit(message)
        kept = kept_of(context.state, (PERSONAL, *rule.keeps))
        model.load(shared, kept.get(PERSONAL))
        rule.adopt(model.shared, kept)
        hide = None if site.evaluation.epsilon is None else site.hide
        probabilities = sequential.predict(
            model, task.probabilities, site.data.test.inputs, classes=site.evaluation.classes, hide=hide
        )
        counts = histogram(probabilities, site.data.test.targets, site.evaluation)
        key = site.message_key("evaluate", _config(message), _contents({"shared": shared}), _contents(kept))
        return gate.release_histogram(message, release(counts, site.evaluation, key.stream()))

    return app


def _config(message: Message) -> Mapping[str, Any]:
    return message.content["config"]


def _contents(records: Mapping[str, Arrays]) -> dict[str, Content]:
    return {name: Content(arrays) for name, arrays in records.items()}


def _noised(plan: LocalPlan, gate: Gate, received: Arrays, update: Arrays, key: Key) -> dict[str, NDArray[np.generic]]:
    """Return the received model with the noised update on it; what the client trained is not sent."""
    before, after = gate.layout.flatten(received), gate.layout.flatten(update)
    noised = plan.release(after - before, key.child("local noise").stream())
    return gate.layout.unflatten(before + noised)


def _compressed(gate: Gate, received: Arrays, update: Arrays, context: Context, key: Key) -> Encoded | None:
    """Return what goes in place of the update, a function of it alone and of earlier ones, and the memory to keep."""
    if gate.compression is None:
        return None
    memory: Any = kept_of(context.state, (MEMORY,)).get(MEMORY, {}).get(MEMORY)
    return gate.compression.codec(gate.layout).encode(update, received, memory, key.child("compression"))


def _refuse_under_privacy(site: Site, what: str) -> None:
    """Raise RunError where a plan accounts for all that is done with the site's records."""
    if site.plan is not None:
        raise RunError("strategy-failed", f"the strategy asks for {what}, which a client under privacy withholds")
