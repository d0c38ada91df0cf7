"""The sums behind the values that a run logs at the end of an epoch, across a resumption.

Lightning adds up the values of an epoch's batches, but leaves the sums out of checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

_REDUCTIONS = {"max": torch.maximum, "min": torch.minimum}


class LoggedSums:
    """Carry the sums of an epoch from a checkpoint into the rest of the epoch, in one process."""

    def __init__(self) -> None:
        # Sums from the checkpoint that have not been added to Lightning's own sums yet.
        self._pending: dict[str, dict[str, Any]] = {}

    def state(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """All sums of the epoch so far, for a checkpoint; to be called after `add`."""
        return self._pending | _present_sums(trainer)

    def resume(self, state: dict[str, dict[str, Any]]) -> None:
        """Begin with the sums of a checkpoint.

        Args:
            state: what `state` returned for the checkpoint; empty for an epoch that begins.
        """
        self._pending = dict(state)

    def add(self, trainer: Trainer) -> None:
        """Add the checkpoint's sums to those that Lightning has started since."""
        results = trainer.fit_loop.epoch_loop._results
        for key in [key for key in self._pending if key in results and not results[key].has_reset]:
            entry, before = results[key], self._pending.pop(key)
            together = _REDUCTIONS.get(entry.meta.reduce_fx.__name__, torch.add)
            for name in entry._defaults:
                now = getattr(entry, name)
                setattr(entry, name, together(before[name].to(now.device), now))

    def log_rest(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the values in the checkpoint that no later batch of the epoch has logged again.

        To be called at the end of the epoch, from ``on_train_epoch_end``.
        """
        results, sums = trainer.fit_loop.epoch_loop._results, self._pending
        self._pending = {}
        for key, before in sums.items():
            name = key.partition(".")[2]
            value = before["value"].to(module.device)
            module.log(name, value, on_step=False, batch_size=1, **before["options"])
            entry = results[f"on_train_epoch_end.{name}"]
            for field in entry._defaults:  # replace the logged value by the sums it came from
                setattr(entry, field, before[field].to(module.device))


def _present_sums(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The sums of the epoch's logged values so far, by Lightning's key, with logging options."""
    found: dict[str, dict[str, Any]] = {}
    for key, entry in trainer.fit_loop.epoch_loop._results.items():
        meta = entry.meta
        if entry.is_tensor and meta.on_epoch and not entry.has_reset:
            found[key] = {name: getattr(entry, name).detach().cpu() for name in entry._defaults}
            found[key]["options"] = {
                "on_epoch": True,
                "logger": meta.logger,
                "prog_bar": meta.prog_bar,
                "sync_dist": meta.sync.should,
                "reduce_fx": meta.reduce_fx.__name__,
            }
    return found
