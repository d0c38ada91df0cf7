"""Settings made by a launcher (torchrun, SLURM), which users then need not repeat as options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.plugins.environments import ClusterEnvironment

from gpd_cli.distributed.sync_norm import SyncedNorms
from gpd_cli.errors import TrainingError


def launched(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a Trainer's options by the launcher's settings.

    - Unless the options give them, numbers of devices and nodes are taken from the launcher.
    - Under SLURM, Lightning's own handling of signals is switched off, since `Interruptions` saves
      and requeues.
    - If batch normalization is to be synchronized over processes, this package's `SyncedNorms` does
      so in place of Lightning's plugin.

    Args:
        options: options of `lightning.pytorch.Trainer`, by name.

    Returns:
        The completed options.

    Raises:
        TrainingError: when SLURM does not know the number of tasks per node.
    """
    options = dict(options)
    sizes = _launched_sizes()
    if sizes and options.get("devices", "auto") == "auto":
        options["devices"] = sizes[0]
        if options.get("num_nodes", 1) == 1:
            options["num_nodes"] = sizes[1]
    plugins = options.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    if options.get("sync_batchnorm") and not any(isinstance(p, LayerSync) for p in plugins):
        options["sync_batchnorm"] = False
        plugins.append(SyncedNorms())
    if slurm_job() and not any(isinstance(p, ClusterEnvironment) for p in plugins):
        plugins.append(slurm_environment())
    options["plugins"] = plugins or None
    return options


def slurm_job() -> str | None:
    """The id of the SLURM job that started this process, as ``scontrol`` takes it; None without."""
    if "SLURM_JOB_ID" not in os.environ or not SLURMEnvironment.detect():
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def slurm_environment() -> SLURMEnvironment:
    """Lightning's description of the SLURM job, with automatic requeueing switched off.

    Raises:
        TrainingError: when SLURM does not know the number of tasks per node.
    """
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise TrainingError(
            f"SLURM started {os.environ.get('SLURM_NTASKS')} tasks without saying how many run on "
            "a node; give --ntasks-per-node instead of --ntasks."
        ) from error


def _launched_sizes() -> tuple[int, int] | None:
    """The launcher's numbers of processes per node and of nodes; None without a launcher."""
    environment = os.environ
    if TorchElasticEnvironment.detect():
        local = int(environment["LOCAL_WORLD_SIZE"])
        return local, int(environment["WORLD_SIZE"]) // local
    if slurm_job() and "SLURM_NTASKS_PER_NODE" in environment:
        nodes = int(environment.get("SLURM_NNODES", "1"))
        return int(environment["SLURM_NTASKS_PER_NODE"]), nodes
    return None
