"""What a launcher tells a process: how many train together, and which of them it is."""

import os

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from gpd_cli.commands.trainer import GpdTrainer
from gpd_cli.distributed import cluster
from gpd_cli.distributed.cluster import launched, slurm_environment
from gpd_cli.errors import TrainingError
from processes import SLURM

BATCH_SCRIPT = SLURM | {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2"}
"""What SLURM tells a command of a job of 16 tasks that srun has not started."""
STEP = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.fixture(autouse=True)
def own_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back Lightning's rank of this process, which a trainer sets, after each test."""
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)


def tell(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "devices", "nodes"),
    [
        (BATCH_SCRIPT | STEP, 8, 2),
        (BATCH_SCRIPT, 1, 1),
        (BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, 1, 1),
        (SLURM, 1, 1),
    ],
    ids=["all tasks", "without srun", "a step of one task", "a job of one task"],
)
def test_run_has_a_device_for_each_task_of_its_step(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], devices: int, nodes: int
) -> None:
    tell(monkeypatch, environment)
    options = launched({})
    assert (options["devices"], options["num_nodes"]) == (devices, nodes)
    assert slurm_environment().world_size() == devices * nodes


@pytest.mark.parametrize(
    ("environment", "devices", "told"),
    [
        ({"SLURM_STEP_NUM_TASKS": "1"}, 2, "SLURM started 1 task, and the run is to have 2 dev"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "4"}, 1, "SLURM started 4 tasks"),
    ],
    ids=["a task for two devices", "four runs in one folder"],
)
def test_other_number_of_tasks_than_devices_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], devices: int, told: str
) -> None:
    """One task would otherwise train on its share of the images, and nobody on the others."""
    job = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"}
    tell(monkeypatch, job | environment)
    with pytest.raises(TrainingError, match=told) as error:
        GpdTrainer(accelerator="cpu", devices=devices, logger=False)
    assert "--ntasks-per-node" in str(error.value)


def test_torchrun_in_a_job_numbers_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To SLURM they are one task: each process would take itself for the first of its own run."""
    tell(monkeypatch, SLURM | TORCHRUN)
    assert not any(isinstance(p, SLURMEnvironment) for p in launched({})["plugins"] or ())
    trainer = GpdTrainer(accelerator="cpu", logger=False)
    assert (trainer.global_rank, trainer.world_size, trainer.num_devices) == (1, 2, 2)


@pytest.mark.parametrize(("accelerator", "count"), [("auto", 1), ("cpu", 0)])
def test_one_task_for_several_gpus_is_remarked(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, count: int
) -> None:
    tell(monkeypatch, SLURM)
    said: list[str] = []
    monkeypatch.setattr(cluster, "rank_zero_info", said.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launched({"accelerator": accelerator})["devices"] == 1
    assert len(said) == count
    assert all("one of the 4 GPUs; srun --ntasks-per-node 4" in remark for remark in said)


@pytest.mark.parametrize("strategy", ["ddp_spawn", DDPStrategy(start_method="spawn")])
def test_strategies_that_pickle_the_networks_are_refused(strategy: str | Strategy) -> None:
    with pytest.raises(TrainingError, match=r"sends the networks .*; use ddp, which"):
        GpdTrainer(accelerator="cpu", devices=2, strategy=strategy)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", ModelParallelStrategy()])
def test_strategies_without_whole_weights_are_refused(strategy: str | Strategy) -> None:
    with pytest.raises(TrainingError, match="the student is cut out of whole weights; use ddp"):
        GpdTrainer(accelerator="cpu", strategy=strategy, logger=False)
