"""A SLURM job that is put back into the queue, and the link to the checkpoint it goes on from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from gpd_cli.distributed.cluster import slurm_job
from gpd_cli.run_folder import STOPPED


def requeue_path(folder: str | Path) -> Path | None:
    """The path of the checkpoint from which this SLURM job goes on when it is requeued.

    Returns None outside SLURM.

    Args:
        folder: the Trainer's ``default_root_dir``.
    """
    job = slurm_job()
    step = os.environ.get("SLURM_STEP_ID", "0")
    return None if job is None else Path(folder) / f"requeue_{job}_{step}.ckpt"


def link_to(path: Path, checkpoint: Path) -> None:
    """Make the requeue path a symbolic link to a checkpoint, replacing an earlier link atomically.

    Args:
        path: the requeue path.
        checkpoint: path of the checkpoint from which the job is to go on.
    """
    link = path.with_name(f".{path.name}")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint)
    link.replace(path)


def remove_stopped(path: Path) -> None:
    """Remove the checkpoint of a stopped run, after a later checkpoint has replaced it.

    Args:
        path: path of a checkpoint; it stays unless its name is `STOPPED`.
    """
    if path.name == STOPPED:
        path.unlink(missing_ok=True)


def put_back() -> str:
    """Put this SLURM job back into the queue.

    Returns:
        The reason if this failed; otherwise an empty text.
    """
    try:
        result = subprocess.run(
            ["scontrol", "requeue", slurm_job() or ""], capture_output=True, text=True
        )
    except OSError as error:
        return str(error)
    if result.returncode == 0:
        return ""
    return " ".join(result.stderr.split()) or f"scontrol ended with code {result.returncode}"
