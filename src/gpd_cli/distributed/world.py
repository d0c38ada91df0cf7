"""The processes that compute together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
_EVERY = 8  # batches between common decisions: for each the processes wait for each other


def batches_between(trainer: Trainer) -> int:
    """How many batches of a run lie between two decisions that its processes take together.

    Args:
        trainer: trainer of the run.
    """
    return _EVERY if trainer.world_size > 1 else 1


def saved_exactly(trainer: Trainer) -> bool:
    """Whether a checkpoint written when a training batch ends resumes exactly there.

    After an epoch's last batch, validation and checkpoints follow, and Lightning resumes behind a
    validation that was to follow within the epoch.

    Args:
        trainer: trainer of the run, in ``on_train_batch_end``.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return not (trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def is_lost_process(error: BaseException) -> bool:
    """Whether an error is that of a process whose partner in the computation is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST)


def world_size() -> int:
    """The number of processes that compute together; 1 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def everywhere(flag: Tensor) -> bool:
    """Whether a flag, a scalar, is set in all processes; all processes have to call this."""
    if world_size() == 1:
        return bool(flag)
    common = flag.to(torch.int32)
    dist.all_reduce(common, op=dist.ReduceOp.MIN)
    return bool(common)


def broadcast_from_first(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give tensors the first process's values, in place; all processes have to ask.

    Args:
        tensors: the tensors to overwrite, such as running statistics; as many and of the same
            shapes in all processes.
        device: the device that trains, on which processes can send: between GPUs they send no
            tensor of the CPU, where an average of the weights may lie.
    """
    if world_size() == 1:
        return
    for tensor in tensors:
        value = tensor.detach().to(device).contiguous()
        dist.broadcast(value, src=0)
        tensor.detach().copy_(value)


def gathered(value: Any) -> list[Any]:
    """A value of each process, by rank, with its tensors on the CPU; all have to ask.

    A tensor is sent with its device. All others would have to have this device, too, and would
    each reserve memory on it.

    Args:
        value: this process's, which can be pickled; tensors may lie in lists, tuples and mappings.
    """
    value = move_data_to_device(value, torch.device("cpu"))
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
