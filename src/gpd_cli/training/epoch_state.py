"""The counters and metrics of a run that Lightning's checkpoints lack.

These are the sums behind logged values, the counts behind accuracies, and the number of rows in
``metrics.csv``. Without them, a run resumed within an epoch would score and log the rest of the
epoch as if it were the whole epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gpd_cli.distributed.world import gathered
from gpd_cli.training.averages import find_averager
from gpd_cli.training.evaluation import EvaluatedModule
from gpd_cli.training.logged_sums import LoggedSums
from gpd_cli.training.metrics import RunningAccuracy
from gpd_cli.training.table import csv_loggers, row_to_come

_ENTRY = "epoch_state"


class EpochState(Callback):
    """Save counters and metrics of the epoch in checkpoints, and restore them in a resumed run.

    For each process: the sums behind the values that are logged at the end of the epoch, and the
    counts behind the training accuracies. For all processes together: the latest values of the
    metrics that callbacks read, the number of rows in ``metrics.csv``, and the gradients of batches
    since the last update.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._sums = LoggedSums()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write counters and metrics into the checkpoint."""
        self._sums.add(trainer)
        progress: Any = trainer.fit_loop.epoch_progress.total
        ended = progress.processed > progress.completed
        own: dict[str, Any] = {"shown": _running_accuracies(pl_module)}
        if not ended:
            own |= {"sums": self._sums.state(trainer), "hits": _accuracy_counts(pl_module)}
        averager = find_averager(trainer)
        tables = csv_loggers(trainer) if trainer.is_global_zero else []
        checkpoint[_ENTRY] = {
            "processes": gathered(own),
            "values": {n: v.detach().cpu() for n, v in trainer.callback_metrics.items()},
            "row": row_to_come(trainer, ended),
            "rows": [logger.rows for logger in tables],
            "average_epoch": None if averager is None else averager._latest_update_epoch,
            "gradients": _accumulated_gradients(trainer, pl_module),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the checkpoint's counters until training starts."""
        self._resumed = checkpoint.get(_ENTRY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the counters and metrics of the checkpoint, if the run is resumed."""
        state, self._resumed = self._resumed, None
        self._sums.resume({})
        if state is None:
            return
        # Without validation, the old scores would choose best.ckpt.
        # Their number is not known yet if the resumed epoch itself is not validated.
        validates = trainer.enable_validation and (
            trainer.val_dataloaders is None or any(trainer.num_val_batches)
        )
        stale = () if validates else ("val/",)
        values = {
            name: value.to(pl_module.device)
            for name, value in state["values"].items()
            if not name.startswith(stale)
        }
        trainer._logger_connector._callback_metrics.update(values)
        if trainer.is_global_zero:
            for table, rows in zip(csv_loggers(trainer), state["rows"], strict=False):
                table.cut_to_checkpoint(rows, state["row"])
        averager = find_averager(trainer)
        if averager is not None and state["average_epoch"] is not None:
            averager._latest_update_epoch = state["average_epoch"]
        if len(state["processes"]) == trainer.world_size:
            own = state["processes"][trainer.global_rank]
            self._sums.resume(own.get("sums", {}))
            _restore_accuracy_counts(pl_module, own.get("hits", {}))
            shown = {name: value.to(pl_module.device) for name, value in own["shown"].items()}
            _running_accuracies(pl_module).update(shown)
            for name, gradient in state.get("gradients", {}).items():
                weight = pl_module.get_parameter(name)
                weight.grad = gradient.to(weight.device, weight.dtype)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the checkpoint's sums to those that Lightning has started with the first batch."""
        self._sums.add(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values in the checkpoint that no later batch of the epoch has logged again."""
        self._sums.add(trainer)
        self._sums.log_rest(trainer, pl_module)


def _accumulated_gradients(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """The gradients, by name, of the batches since the last update; none right after an update.

    They are means over all processes, by which the next update is the same as by their own.
    """
    if not trainer.fit_loop._should_accumulate():
        return {}
    weights = dict(module.named_parameters())
    own = [name for name, weight in weights.items() if weight.grad is not None]
    names = sorted(set().union(*gathered(own)))  # a process may not have used all weights
    return {name: _mean_gradient(weights[name], trainer) for name in names}


def _mean_gradient(weight: Tensor, trainer: Trainer) -> Tensor:
    """The mean of a weight's gradient over all processes, on the CPU."""
    own = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
    mean: Tensor = trainer.strategy.reduce(own.detach(), reduce_op="mean")
    return mean.cpu()


def _accuracy_counts(module: LightningModule) -> dict[str, dict[str, Any]]:
    """The states of the training accuracies (counts of correct predictions), by metric name."""
    if not isinstance(module, EvaluatedModule):
        return {}
    return {
        name: {key: getattr(metric, key).detach().cpu() for key in metric.metric_state}
        for name, metric in module.train_scores.named_metrics()
        if metric.update_called
    }


def _restore_accuracy_counts(
    module: LightningModule, hits: Mapping[str, Mapping[str, Tensor]]
) -> None:
    if not isinstance(module, EvaluatedModule):
        return
    for name, metric in module.train_scores.named_metrics():
        for key, value in hits.get(name, {}).items():
            setattr(metric, key, value.to(module.device))
            metric._update_count = 1


def _running_accuracies(module: LightningModule) -> dict[str, Tensor]:
    """The running accuracies of the progress bar, by network."""
    running = getattr(module, "live", None)
    return running.values if isinstance(running, RunningAccuracy) else {}
