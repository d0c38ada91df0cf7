"""Disturbances of a run from within, at a moment chosen at random."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

PLAN = "GPD_CHAOS"
"""Environment variable with the disturbance of a run, as ``WHAT:STEP:RANK:WAIT``.

WHAT is ``kill``, ``save`` or one of the faults. STEP and RANK say when and in which process. WAIT
is the time in seconds to wait before a kill, or for ``save`` a number that chooses the moment.
"""


class Strike(Callback):
    """Disturbs a run once, as the environment variable `PLAN` says; without it nothing happens."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the disturbance when the step has come."""
        plan = os.environ.get(PLAN)
        if not plan:
            return
        what, step, rank, wait = plan.split(":")
        if trainer.global_step < int(step) or trainer.global_rank != int(rank):
            return
        del os.environ[PLAN]
        if what == "save":
            _at_next_save(float(wait))
        elif what == "kill":
            threading.Thread(target=_kill_after, args=(float(wait),), daemon=True).start()
        else:
            _FAULTS[what](Path(str(trainer.log_dir)))


def _kill_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _at_next_save(share: float) -> None:
    """Kill the process while it saves the next checkpoint.

    Args:
        share: a number from 0 to 1 that chooses the moment: while the file is being written (below
            0.4), before it is synced (below 0.6), before it is renamed (below 0.8), or right after.
    """
    replace = os.replace

    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if share < 0.4:
        threading.Thread(target=_in_the_file, daemon=True).start()
    elif share < 0.6:
        os.fsync = killed  # type: ignore[assignment]
    elif share < 0.8:
        os.replace = killed  # type: ignore[assignment]
        Path.replace = killed  # type: ignore[assignment, method-assign]
    else:

        def after(*arguments: Any) -> None:
            replace(*arguments)
            killed()

        Path.replace = after  # type: ignore[assignment, method-assign]


def _in_the_file() -> None:
    """Kill the process as soon as a temporary file has its first bytes."""
    while True:
        for path in Path.cwd().rglob(".tmp-*"):
            if path.exists() and path.stat().st_size:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0005)


def _fill(run: Path) -> None:
    """Fill the disk that a run writes to."""
    with (run.parent / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def _protect(run: Path) -> None:
    """Make the disk read-only."""
    mount = next(path for path in run.resolve().parents if path.is_mount())
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)


def _take_away(run: Path) -> None:
    """Move the run's folder to another place."""
    run.rename(run.with_name("taken"))


def _forbid(run: Path) -> None:
    """Replace the run's folder by a file."""
    run.rename(run.with_name("taken"))
    run.write_text("in the way")


_FAULTS = {"fill": _fill, "protect": _protect, "take": _take_away, "forbid": _forbid}
