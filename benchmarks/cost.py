"""What the main job costs on this machine: time, memory, and the calibration of its noise.

    python benchmarks/cost.py [--repeats 5] [--json]

Everything is measured in fresh processes, and the figures are medians over the repeats, since other work may share the
machine. Nothing heavy is imported here: a child's peak memory would count what its parent held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

IMPORTS = (
    "import bract.simulations.run, bract.tasks.tabular, bract.tasks.metrics, bract.privacy.dpsgd, opacus, matplotlib"
)
CALIBRATION = """
import time
from bract.experiment import Experiment
from bract.simulations.experiments import DEFAULT_EXPERIMENT
from bract.server.plan import make_plan
from bract.simulations.plan import load_clients
from bract.tasks.registry import find_task
import dp_accounting.pld, dp_accounting.rdp

experiment = Experiment.load(DEFAULT_EXPERIMENT)
sites = load_clients(experiment, find_task(experiment))
started = time.perf_counter(), time.process_time()
plan = make_plan(experiment, {name: len(site.train) for name, site in sites.items()}, 2, lambda event: None)
print(time.perf_counter() - started[0], time.process_time() - started[1])
assert len(plan.mechanisms) == 4
"""

Figures = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats: must be at least 1")

    measures: dict[str, Callable[[], Figures]] = {"help": measure_help, "imports": measure_imports}
    measures |= {"calibration": measure_calibration, "simulate": measure_simulate}
    runs: dict[str, list[Figures]] = {name: [] for name in measures}
    # In turns, so that a busy minute of the machine does not fall on one of them alone.
    for _ in range(options.repeats):
        for name, measure in measures.items():
            runs[name].append(measure())
    medians = {
        name: {figure: median(run[figure] for run in found) for figure in found[0]} for name, found in runs.items()
    }
    if options.json:
        print(json.dumps({"machine": machine(), "medians": medians, "runs": runs}, indent=2))
    else:
        print(text(medians))
    return 0


def measure_help() -> Figures:
    """Time `bract --help`, which imports nothing heavy."""
    return run([sys.executable, "-m", "bract", "--help"])[0]


def measure_imports() -> Figures:
    """Time the imports that a run needs, most of them other people's."""
    return run([sys.executable, "-c", IMPORTS])[0]


def measure_calibration() -> Figures:
    """Time the calibration of the four hospitals' noise, imports and data apart."""
    _, output = run([sys.executable, "-c", CALIBRATION])
    seconds, processor_seconds = map(float, output.split())
    return {"seconds": seconds, "processor_seconds": processor_seconds}


def measure_simulate() -> Figures:
    """Time `bract simulate` as a user runs it, with curves, comparison and report."""
    with tempfile.TemporaryDirectory() as folder:
        figures, output = run([sys.executable, "-m", "bract", "simulate", "--json", "--out", f"{folder}/run"])
    return {**figures, "calibration_and_training_seconds": json.loads(output)["seconds"]}


def run(command: Sequence[str]) -> tuple[Figures, str]:
    """Run a command to its end and return its wall time, processor time and peak memory, and what it printed."""
    # With files instead of pipes, `wait4` needs nobody to read while it waits.
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("output", "errors")]
        with streams[0].open("wb") as output, streams[1].open("wb") as errors:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command[:4])}: exit status {process.returncode}\n{streams[1].read_text()}")
        # Kibibytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        figures = {
            "seconds": seconds,
            "processor_seconds": usage.ru_utime + usage.ru_stime,
            "peak_mebibytes": usage.ru_maxrss * unit / 2**20,
        }
        return figures, streams[0].read_text()


def machine() -> dict[str, str | int | None]:
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = found[0] if found else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }


def text(medians: dict[str, Figures]) -> str:
    """Return the figures as a Markdown table."""
    whole = medians["simulate"]
    names = {
        "help": "`bract --help`",
        "imports": "the imports of `bract simulate`",
        "calibration": "calibrating the noise of four hospitals",
        "simulate": "`bract simulate`, the imports and all else",
    }
    lines = ["| what | wall time | processor time | of the whole | peak memory |", "| --- | --- | --- | --- | --- |"]
    for name, what in names.items():
        of = medians[name]
        memory = f"{of['peak_mebibytes']:.0f} MiB" if "peak_mebibytes" in of else ""
        share = of["processor_seconds"] / whole["processor_seconds"]
        times = f"{of['seconds']:.2f} s | {of['processor_seconds']:.2f} s"
        lines.append(f"| {what} | {times} | {share:.0%} | {memory} |")
    about = ", ".join(f"{name} {value}" for name, value in machine().items())
    return "\n".join([about, "", *lines])


if __name__ == "__main__":
    raise SystemExit(main())
