"""Runs whose disk fills up, becomes read-only, or loses the run's folder while the run saves."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.chaos.runs import fit, prepare
from gpd_cli.errors import WeightsError
from gpd_cli.files import check_whole

FAULTS = ("fill", "protect", "take", "forbid")
_STEP = 7  # step at which the disk fails, in the second epoch
_SIZE = "12m"  # size of the mounted disk


def strike_disk(folder: Path, fault: str) -> tuple[str, str]:
    """Start a run, and let its disk fail in the second epoch.

    Args:
        folder: folder to run in, which is removed afterwards.
        fault: one of `FAULTS`; for ``fill`` and ``protect`` a disk (tmpfs) is mounted.

    Returns:
        The last message of the run, and a description of the problem, empty if there is none. It is
        a problem as well if no disk could be mounted, since nothing has then been tested.
    """
    prepare(folder)
    runs = folder / "runs"
    runs.mkdir()
    mounted = fault in ("fill", "protect")
    if mounted and (os.geteuid() != 0 or not _mount(runs)):
        return "this needs root rights", "not tested, since no disk could be mounted"
    try:
        arguments = ["-c", "run.yaml", "--data.num_workers", "0"]
        codes, log = fit(folder, arguments, plan=f"{fault}:{_STEP}:0:0")
        said = [line for line in log.splitlines() if line.startswith("gpd: error:")]
        kept = list(runs.rglob("last.ckpt"))
        problem = ""
        if "Traceback" in log:
            problem = f"a traceback: {log[-500:]}"
        elif codes[0] and len(said) != 1:
            problem = f"ended with {codes} and no sentence: {log[-300:]}"
        elif not kept:
            problem = "no checkpoint is left"
        for path in kept:
            try:
                check_whole(path)
            except WeightsError as error:
                problem = str(error)
        return (said or ["it went on"])[0], problem
    finally:
        if mounted:
            subprocess.run(["umount", str(runs)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
