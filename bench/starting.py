"""``python -m bench.starting``: CPU seconds until help is shown, and until a run's first step."""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

from lightning.pytorch import Callback

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "gpd --version": ["-m", "gpd_cli", "--version"],
    "gpd fit --help": ["-m", "gpd_cli", "fit", "--help"],
    "gpd extract --help": ["-m", "gpd_cli", "extract", "--help"],
}
RUN = [
    *("-m", "gpd_cli", "fit", "-c", "recipe:digits", "--model.student_args", "{in_chans: 1}"),
    *("--trainer.callbacks+", "bench.starting.FirstStep"),
]
"""Command of the run: ResNet-18 at its usual widths, with six branches, on small images."""
STAGES = ("the command line is read", "the first step begins", "the first step ends")


class FirstStep(Callback):
    """Prints the CPU time that this process has taken up to its first step, and ends the run."""

    def __init__(self) -> None:
        self.seconds = [time.process_time()]

    def on_train_batch_start(self, *args: object) -> None:
        """Record the CPU time at the beginning of the first step."""
        self.seconds.append(time.process_time())

    def on_train_batch_end(self, *args: object) -> None:
        """Print the CPU times after the first step, and end the process."""
        self.seconds.append(time.process_time())
        print("starting:", *self.seconds, flush=True)
        os._exit(0)


def main() -> None:
    """Print the median time of each command and stage over several interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            taken.setdefault(name, []).append(seconds_of(command)[0])
        for stage, seconds in zip(STAGES, seconds_of(RUN)[1:], strict=True):
            taken.setdefault(f"gpd fit: {stage}", []).append(seconds)
    for name, all_seconds in taken.items():
        print(f"{statistics.median(all_seconds):6.2f} s  {name}")


def seconds_of(command: list[str]) -> list[float]:
    """Run Python with a command, and measure its CPU time.

    Args:
        command: arguments of Python.

    Returns:
        CPU seconds of the whole process, followed by those that `FirstStep` has printed, if any.
    """
    before = os.times()
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
    after = os.times()
    whole = sum(after[2:4]) - sum(before[2:4])
    said = re.search(r"^starting: (.*)$", done.stdout, re.MULTILINE)
    return [whole, *(map(float, said[1].split()) if said else ())]


if __name__ == "__main__":
    main()
