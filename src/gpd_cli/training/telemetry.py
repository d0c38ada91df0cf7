"""Telemetry of a run: learning rate, gradient norm, throughput and memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

_GIB = 2**30


class Telemetry(Callback):
    """Log learning rate, gradient norm, throughput and memory every ``log_every_n_steps`` steps.

    The values go to all loggers of the run. ``lr``: learning rate of the first parameter group.
    ``grad_norm``: norm of all gradients, before clipping. ``images_per_second``: throughput of all
    processes together, since these values were last logged. ``memory_gib``: peak memory of the
    process in GiB, on the accelerator if there is one.
    """

    def __init__(self) -> None:
        self._images, self._since = 0, 0.0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, also for a run that is resumed within an epoch."""
        self._since, self._step = time.perf_counter(), trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock, since validation and checkpoints are not part of a step's time."""
        self._images, self._since = 0, time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock after a validation within an epoch as well."""
        self._images, self._since = 0, time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Log learning rate and gradient norm."""
        if not _is_logged(trainer, trainer.global_step + 1):
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        values = {"lr": optimizer.param_groups[0]["lr"], "grad_norm": get_total_norm(gradients)}
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log throughput and memory."""
        self._images += len(batch[0])
        if trainer.global_step == self._step:  # gradients are accumulated, without a step
            return
        self._step = trainer.global_step
        if not _is_logged(trainer, self._step):
            return
        now = time.perf_counter()
        values = {
            "images_per_second": self._images * trainer.world_size / (now - self._since),
            "memory_gib": peak_memory(pl_module.device) / _GIB,
        }
        pl_module.log_dict(values, on_step=True, on_epoch=False)
        self._images, self._since = 0, now


def _is_logged(trainer: Trainer, step: int) -> bool:
    """Whether a step, counted from 1, is logged; with an interval of 0, no step is."""
    interval = int(trainer.log_every_n_steps)  # type: ignore[attr-defined] # set by its connector
    return interval > 0 and step % interval == 0


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes.

    Args:
        device: for a GPU, the peak of the memory that was allocated on it; for any other device,
            the peak of the process's memory on the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
