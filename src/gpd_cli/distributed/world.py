"""Communication between the processes that train together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
_EVERY = 8  # batches between common decisions, each of which makes processes wait for each other


def batches_between(trainer: Trainer) -> int:
    """The number of batches between two decisions that all processes of a run take together.

    Args:
        trainer: trainer of the run.
    """
    return _EVERY if trainer.world_size > 1 else 1


def saved_exactly(trainer: Trainer) -> bool:
    """Whether a run can be resumed exactly from a checkpoint written at the end of this batch.

    This is not so after the last batch of an epoch, which is followed by validation and
    checkpoints, nor before a validation within the epoch, which Lightning would leave out when it
    resumes.

    Args:
        trainer: trainer of the run, in ``on_train_batch_end``.
    """
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return not (trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that this process has lost the connection to another process."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST)


def world_size() -> int:
    """The number of processes that train together; 1 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def everywhere(flag: Tensor) -> bool:
    """Whether a flag is set in all processes; all processes have to call this function together.

    Args:
        flag: this process's flag, a boolean scalar tensor.
    """
    if world_size() == 1:
        return bool(flag)
    common = flag.to(torch.int32)
    dist.all_reduce(common, op=dist.ReduceOp.MIN)
    return bool(common)


def broadcast_from_first(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Overwrite tensors with the values in the first process; all processes have to call this.

    Args:
        tensors: the tensors to overwrite, such as running statistics; their number and shapes have
            to be the same in all processes.
        device: the training device, through which the values are sent. GPU processes cannot send
            tensors that lie on the CPU, where an average of the weights may be.
    """
    if world_size() == 1:
        return
    for tensor in tensors:
        value = tensor.detach().to(device).contiguous()
        dist.broadcast(value, src=0)
        tensor.detach().copy_(value)


def gathered(value: Any) -> list[Any]:
    """Gather a value from every process; all processes have to call this function together.

    Tensors are moved to the CPU before they are sent. On another device, all processes would need
    that device as well, and would each reserve memory on it.

    Args:
        value: this process's value. It has to be picklable; tensors may be inside lists, tuples and
            mappings.

    Returns:
        The values of all processes, in the order of ranks, with tensors on the CPU.
    """
    value = move_data_to_device(value, torch.device("cpu"))
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
