"""How an epoch is divided into batches, for a run that goes on within it with other batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import IterableDataset

from gpd_cli.distributed.interruptions import batch_size_of
from gpd_cli.errors import TrainingError
from gpd_cli.forms import check_form, maybe, within

ENTRY = "epoch_length"
"""The entry of checkpoints; those of earlier versions lack it."""
_COUNT = within(1, 2**53)


@dataclass(frozen=True)
class EpochLength:
    """The batches of an epoch.

    Args:
        batches: batches of an epoch, per process; None where the data has no length.
        batch_size: images in a batch of one process; None where the loader does not tell.
        processes: number of processes that train together, each on batches of its own.
        accumulated: number of batches per update.
    """

    batches: int | None
    batch_size: int | None
    processes: int
    accumulated: int

    @classmethod
    def of(cls, trainer: Trainer) -> EpochLength:
        """The batches of an epoch of a run, once its data has been set up."""
        batches = trainer.num_training_batches
        return cls(
            None if batches == math.inf else int(batches),
            batch_size_of(trainer.train_dataloader),
            trainer.world_size,
            trainer.accumulate_grad_batches,
        )

    def state(self) -> dict[str, int | None]:
        """Plain values for a checkpoint."""
        return asdict(self)


def check_epoch_length(state: Any, place: str) -> None:
    """Check the form of a checkpoint's entry.

    Raises:
        FormError: when it has another one.
    """
    maybe_count = maybe(_COUNT)
    form = {"batches": maybe_count, "batch_size": maybe_count}
    check_form(state, form | {"processes": _COUNT, "accumulated": _COUNT}, place)


def batches_done(done: int, before: EpochLength, now: EpochLength) -> int:
    """The number of batches that a run which goes on has behind it in its epoch.

    They end at an update. Images between there and the place in the epoch, fewer than an update
    takes, are seen a second time; at least one update is left to make.

    Args:
        done: number of batches that were trained of an epoch that has not come to its end.
        before: how the epoch was divided.
        now: how it is divided.

    Example:
        >>> before = EpochLength(batches=10, batch_size=32, processes=2, accumulated=1)
        >>> batches_done(5, before, EpochLength(40, 16, 1, 1))
        20
        >>> batches_done(5, before, EpochLength(7, 48, 2, 1))  # 320 images are 3.3 batches of 96
        3
    """
    if before == now:
        return done
    if before.batch_size and now.batch_size:
        seen = done * before.batch_size * before.processes
        done = seen // (now.batch_size * now.processes)
    elif before.batches and now.batches:
        done = done * now.batches // before.batches
    if now.batches is not None:
        done = min(done, now.batches - 1)
    return done // now.accumulated * now.accumulated


def updates_done(trainer: Trainer) -> int:
    """The number of updates that a run has made in its epoch; all of them after its end."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    batches: int = progress.processed
    return math.ceil(batches / trainer.accumulate_grad_batches)


def take_up(state: Mapping[str, int | None], trainer: Trainer) -> None:
    """Let a run whose epochs are divided in another way go on at its image and not at its batch.

    Args:
        state: the checkpoint's `EpochLength.state`.
        trainer: trainer of the run, which has loaded its counters.

    Raises:
        TrainingError: when it cannot be told which images were seen.
    """
    trainer.fit_loop.setup_data()
    before, now = EpochLength(**state), EpochLength.of(trainer)  # type: ignore[arg-type]
    if before == now:
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress
    current: Any = progress.current
    if progress.is_last_batch or current.processed == before.batches:
        done = now.batches or current.processed
    else:
        _check_stream(trainer, before, now)
        done = batches_done(current.processed, before, now)
    # A checkpoint is written before or after its batch has been completed.
    open_batches = current.processed - current.completed
    current.ready = current.started = current.processed = done
    current.completed = done - open_batches


def _check_stream(trainer: Trainer, before: EpochLength, now: EpochLength) -> None:
    """Refuse a stream whose images come in other batches.

    Each process, and each of its workers, has a part of the stream for itself.
    """
    data = getattr(trainer.train_dataloader, "dataset", None)
    same = (before.batch_size, before.processes) == (now.batch_size, now.processes)
    if same or not isinstance(data, IterableDataset):
        return
    size = f"--data.batch_size {before.batch_size} and " if before.batch_size else ""
    raise TrainingError(
        "The checkpoint was written within an epoch of a stream, whose images come in another "
        "order in batches of another size or on another number of devices, so that it cannot be "
        f"told which of them were seen; go on with {size}{before.processes} devices in all "
        "(--trainer.devices, --trainer.num_nodes), or from a checkpoint of an epoch's end."
    )
