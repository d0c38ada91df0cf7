"""The commands that a stopped run names, with which the user goes on."""

from __future__ import annotations

import shlex
from pathlib import Path

from lightning.fabric.plugins.environments import TorchElasticEnvironment

from gpd_cli.files import short_path
from gpd_cli.run_folder import CONFIGURATION


def resume_command(path: Path) -> str:
    """The command that resumes a run from its newest checkpoint.

    Args:
        path: path of this checkpoint, in the run's folder.
    """
    run = path.parent.parent
    if (run / CONFIGURATION).is_file():
        return f"{_launcher()} fit --resume {shlex.quote(short_path(run))}"
    return restart_command(Path("CONFIG"), path)


def restart_command(config: Path, checkpoint: Path) -> str:
    """The command that starts a new run from a checkpoint.

    Args:
        config: path of the run's configuration.
        checkpoint: path of the checkpoint.
    """
    files = (shlex.quote(short_path(path)) for path in (config, checkpoint))
    return "{} fit -c {} --ckpt_path {}".format(_launcher(), *files)


def _launcher() -> str:
    return "torchrun ... -m gpd_cli" if TorchElasticEnvironment.detect() else "gpd"
