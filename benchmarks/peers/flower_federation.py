"""Rounds that do nothing in Flower's own deployment: a SuperLink, SuperNodes and a run, each its own processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "noop"
version = "1.0.0"
description = "Rounds that do nothing"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "noop"

[tool.flwr.app.components]
serverapp = "noop.apps:server"
clientapp = "noop.apps:client"

[tool.flwr.app.config]
rounds = 0
clients = 0
out = ""
"""
APPS = '''
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes the seconds from configure to aggregate."""

    seconds = []

    def configure_train(self, *given):
        self.begun = time.perf_counter()
        return super().configure_train(*given)

    def aggregate_train(self, *given):
        found = super().aggregate_train(*given)
        self.seconds.append(time.perf_counter() - self.begun)
        return found


@server.main()
def main(grid, context):
    config = context.run_config
    number = config["clients"]
    strategy = Timed(fraction_evaluate=0.0, min_available_nodes=number, min_train_nodes=number)
    model = ArrayRecord({"w": Array(np.zeros(10, np.float32))})
    strategy.start(grid=grid, initial_arrays=model, num_rounds=config["rounds"])
    Path(config["out"]).write_text(json.dumps(strategy.seconds))
'''


def measure(*, clients: int, rounds: int, port: int, patience: float = 300) -> list[float]:
    """Return the seconds of each round, from configure to aggregate. Ports from `port` on must be free."""
    programs = Path(sys.executable).parent
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        app, home, out = folder / "app", folder / "home", folder / "seconds.json"
        for made in (app / "noop", home):
            made.mkdir(parents=True)
        (app / "pyproject.toml").write_text(PROJECT)
        (app / "noop" / "__init__.py").touch()
        (app / "noop" / "apps.py").write_text(APPS)
        address = f"127.0.0.1:{port}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
        )
        quiet = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        environment = os.environ | quiet | {"PATH": f"{programs}:{os.environ['PATH']}"}

        def start(*command: str) -> None:
            process = subprocess.Popen(
                [str(programs / command[0]), "--insecure", *command[1:]],
                env=environment,
                cwd=folder,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(_end, process)

        start("flower-superlink", "--host", "127.0.0.1", "--port", str(port))
        time.sleep(5)
        for number in range(clients):
            start("flower-supernode", "--superlink", address, "--port", str(port + 1 + number))
        time.sleep(5)
        config = f'rounds={rounds} clients={clients} out="{out}"'
        ran = [str(programs / "flwr"), "run", str(app), "here", "--run-config", config]
        subprocess.run(ran, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=patience)
        end = time.monotonic() + patience
        while not out.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"Flower's run took longer than {patience:g} s")
            time.sleep(0.2)
        time.sleep(0.2)
        found: list[float] = json.loads(out.read_text())
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started: each is a session of its own."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    print(json.dumps(measure(clients=4, rounds=3, port=19091)))
