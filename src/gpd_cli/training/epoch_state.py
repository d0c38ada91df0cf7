"""The counters and metrics of a run that Lightning's checkpoints lack.

These are the sums behind logged values, the counts behind accuracies, and the number of rows in
``metrics.csv``. Without them, a run resumed within an epoch would score and log the rest of the
epoch as if it were the whole epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from gpd_cli.distributed.world import gathered
from gpd_cli.training.averages import find_averager
from gpd_cli.training.evaluation import EvaluatedModule
from gpd_cli.training.metrics import RunningAccuracy
from gpd_cli.training.table import RunCSVLogger

_ENTRY = "epoch_state"
_REDUCTIONS = {"max": torch.maximum, "min": torch.minimum}


class EpochState(Callback):
    """Save counters and metrics of the epoch in checkpoints, and restore them in a resumed run.

    For each process: the sums behind the values that are logged at the end of the epoch, and the
    counts behind the training accuracies. For all processes together: the latest values of the
    metrics that callbacks read, and the number of rows in ``metrics.csv``.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        # Sums from the checkpoint that have not been added to Lightning's own sums yet.
        self._sums: dict[str, dict[str, Any]] = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write counters and metrics into the checkpoint."""
        self._add_sums(trainer)
        progress: Any = trainer.fit_loop.epoch_progress.total
        ended = progress.processed > progress.completed
        own: dict[str, Any] = {"shown": _shown(pl_module)}
        if not ended:
            own |= {"sums": self._sums | _sums(trainer), "hits": _hits(pl_module)}
        averager = find_averager(trainer)
        checkpoint[_ENTRY] = {
            "processes": gathered(own),
            "values": {n: v.detach().cpu() for n, v in trainer.callback_metrics.items()},
            "row": _row_to_come(trainer, ended),
            "rows": [table.rows for table in _tables(trainer)] if trainer.is_global_zero else [],
            "average_epoch": None if averager is None else averager._latest_update_epoch,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the checkpoint's counters until training starts; correct paths if a folder moved.

        The states of `ModelCheckpoint` callbacks hold paths, which are replaced if the run's folder
        has another path than when the checkpoint was written.
        """
        self._resumed = checkpoint.get(_ENTRY)
        if any(table.continues for table in _tables(trainer)):
            for callback in trainer.checkpoint_callbacks:
                state = checkpoint.get("callbacks", {}).get(callback.state_key)
                if state and isinstance(callback, ModelCheckpoint) and callback.dirpath:
                    _move(state, str(callback.dirpath))
                    callback.current_score = state["current_score"]  # Lightning does not restore it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the counters and metrics of the checkpoint, if the run is resumed."""
        state, self._resumed = self._resumed, None
        self._sums = {}
        if state is None:
            return
        values = {name: value.to(pl_module.device) for name, value in state["values"].items()}
        trainer._logger_connector._callback_metrics.update(values)
        if trainer.is_global_zero:
            for table, rows in zip(_tables(trainer), state["rows"], strict=False):
                table.go_on(rows, state["row"])
        averager = find_averager(trainer)
        if averager is not None and state["average_epoch"] is not None:
            averager._latest_update_epoch = state["average_epoch"]
        if len(state["processes"]) == trainer.world_size:
            own = state["processes"][trainer.global_rank]
            self._sums = dict(own.get("sums", {}))
            _take_hits(pl_module, own.get("hits", {}))
            shown = {name: value.to(pl_module.device) for name, value in own["shown"].items()}
            _shown(pl_module).update(shown)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the checkpoint's sums to those that Lightning has started with the first batch."""
        self._add_sums(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values in the checkpoint that no later batch of the epoch has logged again."""
        self._add_sums(trainer)
        results, sums = trainer.fit_loop.epoch_loop._results, self._sums
        self._sums = {}
        for key, before in sums.items():
            name = key.partition(".")[2]
            value = before["value"].to(pl_module.device)
            pl_module.log(name, value, on_step=False, batch_size=1, **before["options"])
            entry = results[f"on_train_epoch_end.{name}"]
            for part in entry._defaults:  # replace the logged value by the sums that it came from
                setattr(entry, part, before[part].to(pl_module.device))

    def _add_sums(self, trainer: Trainer) -> None:
        results = trainer.fit_loop.epoch_loop._results
        for key in [key for key in self._sums if key in results and not results[key].has_reset]:
            entry, before = results[key], self._sums.pop(key)
            together = _REDUCTIONS.get(entry.meta.reduce_fx.__name__, torch.add)
            for part in entry._defaults:
                now = getattr(entry, part)
                setattr(entry, part, together(before[part].to(now.device), now))


def _sums(trainer: Trainer) -> dict[str, dict[str, Any]]:
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


def _hits(module: LightningModule) -> dict[str, dict[str, Any]]:
    """The states of the training accuracies (counts of correct predictions), by metric name."""
    if not isinstance(module, EvaluatedModule):
        return {}
    return {
        name: {key: getattr(metric, key).detach().cpu() for key in metric.metric_state}
        for name, metric in module.train_scores.named_metrics()
        if metric.update_called
    }


def _take_hits(module: LightningModule, hits: Mapping[str, Mapping[str, Tensor]]) -> None:
    if not isinstance(module, EvaluatedModule):
        return
    for name, metric in module.train_scores.named_metrics():
        for key, value in hits.get(name, {}).items():
            setattr(metric, key, value.to(module.device))
            metric._update_count = 1


def _shown(module: LightningModule) -> dict[str, Tensor]:
    """The running accuracies of the progress bar, by network."""
    running = getattr(module, "live", None)
    return running.values if isinstance(running, RunningAccuracy) else {}


def _row_to_come(trainer: Trainer, ended: bool) -> dict[str, Any] | None:
    """The row that Lightning will log right after this checkpoint; None if there is none.

    Args:
        trainer: trainer of the run.
        ended: whether the checkpoint is written at the end of an epoch.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress: Any = loop.batch_progress.total
    step = loop._batches_that_stepped
    if ended:
        step -= 1  # at the end of an epoch Lightning logs the number of the last step
    elif progress.processed == progress.completed:
        return None  # a checkpoint after validation: the row has been logged already
    elif loop._should_accumulate() or not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"step": step, "values": {**values, "epoch": trainer.current_epoch}} if values else None


def _tables(trainer: Trainer) -> list[RunCSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunCSVLogger)]


def _move(state: dict[str, Any], folder: str) -> None:
    """Replace the folder in all paths of a `ModelCheckpoint` state, in place."""
    before = str(state.get("dirpath"))

    def moved(path: str) -> str:
        return str(Path(folder) / Path(path).relative_to(before)) if path else path

    if before == folder:
        return
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if Path(state[name]).is_relative_to(before):
            state[name] = moved(state[name])
    state["best_k_models"] = {moved(p): score for p, score in state["best_k_models"].items()}
    state["dirpath"] = folder
