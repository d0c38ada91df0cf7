"""Settings made by a launcher (torchrun, SLURM), which users then need not repeat as options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.utilities import rank_zero_info

from gpd_cli.distributed.sync_norm import SyncedNorms
from gpd_cli.errors import TrainingError


def launched(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a Trainer's options by the launcher's settings.

    - Unless the options give them, numbers of devices and nodes are taken from the launcher. Under
      SLURM these are the tasks of this step, and torchrun within a SLURM job comes first.
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
        _remark_on_idle(options.get("accelerator", "auto"), sizes)
        options["devices"] = sizes[0]
        if options.get("num_nodes", 1) == 1:
            options["num_nodes"] = sizes[1]
    plugins = options.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    if options.get("sync_batchnorm") and not any(isinstance(p, LayerSync) for p in plugins):
        options["sync_batchnorm"] = False
        plugins.append(SyncedNorms())
    if _slurm_launched() and not any(isinstance(p, ClusterEnvironment) for p in plugins):
        plugins.append(slurm_environment())
    options["plugins"] = plugins or None
    return options


def slurm_job() -> str | None:
    """The id of the SLURM job that started this process, as ``scontrol`` takes it; None without."""
    if "SLURM_JOB_ID" not in os.environ or not SLURMEnvironment.detect():
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def slurm_tasks() -> int:
    """The number of tasks that srun started together with this process.

    The variables of the job may count other tasks: those of the whole job, where this is a step of
    fewer tasks (``srun -n 1``), or a command of the batch script that srun has not started.
    """
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


class SlurmStep(SLURMEnvironment):
    """Lightning's description of SLURM, with the tasks of this step in place of those of the job.

    With the number of the job's tasks, a step of fewer tasks would wait for processes that nobody
    starts.
    """

    @staticmethod
    def _validate_srun_variables() -> None:
        """Do nothing here: `slurm_environment` checks the variables of the step."""

    def world_size(self) -> int:
        """The number of processes that train together."""
        return slurm_tasks()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check that there is a task for each device, see `check_tasks`."""
        _check_tasks(num_devices, num_nodes)


def slurm_environment() -> SlurmStep:
    """The description of the SLURM job, with automatic requeueing by Lightning switched off.

    Raises:
        TrainingError: when SLURM does not know the number of tasks per node.
    """
    if (tasks := slurm_tasks()) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise TrainingError(
            f"SLURM started {tasks} tasks without saying how many run on a node; give "
            "--ntasks-per-node instead of --ntasks."
        )
    return SlurmStep(auto_requeue=False)


def check_tasks(trainer: Trainer) -> None:
    """Check that SLURM has started one task for each device of a run.

    With fewer tasks than devices, each task would train on its share of the images, and no task on
    the other shares. With more tasks, several runs would write into one folder.

    Args:
        trainer: trainer of the run.

    Raises:
        TrainingError: when the numbers differ.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SlurmStep):
        _check_tasks(trainer.num_devices, trainer.num_nodes)


def _check_tasks(devices: int, nodes: int) -> None:
    tasks = slurm_tasks()
    if devices * nodes == tasks:
        return
    started = "1 task" if tasks == 1 else f"{tasks} tasks"
    wanted = f"{devices} {'device' if devices == 1 else 'devices'}"
    raise TrainingError(
        f"SLURM started {started}, and the run is to have {wanted} on {nodes} "
        f"{'node' if nodes == 1 else 'nodes'}; start a task for each device (srun --nodes {nodes} "
        f"--ntasks-per-node {devices}), or leave out --trainer.devices and --trainer.num_nodes."
    )


def _slurm_launched() -> bool:
    """Whether SLURM started this process, and not torchrun within a SLURM job."""
    return slurm_job() is not None and not TorchElasticEnvironment.detect()


def _remark_on_idle(accelerator: Any, sizes: tuple[int, int]) -> None:
    """Say that a run has one GPU of several, if SLURM has started a single task."""
    if accelerator not in ("auto", "gpu", "cuda") or sizes != (1, 1) or not _slurm_launched():
        return
    if (visible := torch.cuda.device_count()) > 1:
        rank_zero_info(
            f"SLURM started one task, so that the run has one of the {visible} GPUs; srun "
            f"--ntasks-per-node {visible} starts a task for each."
        )


def _launched_sizes() -> tuple[int, int] | None:
    """The launcher's numbers of processes per node and of nodes; None without a launcher."""
    environment = os.environ
    if TorchElasticEnvironment.detect():
        local = int(environment["LOCAL_WORLD_SIZE"])
        return local, int(environment["WORLD_SIZE"]) // local
    if slurm_job():
        tasks = slurm_tasks()
        given = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1"))
        nodes = min(tasks, int(given))  # a command that srun has not started runs on one node
        return tasks // nodes, nodes
    return None
