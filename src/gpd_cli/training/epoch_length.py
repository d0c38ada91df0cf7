"""The division of an epoch into batches, for runs resumed within an epoch with another division.

A run may be resumed with another batch size or number of processes. The resumed run then has to
find the batch from which on the epoch's images have not been seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import IterableDataset

from gpd_cli.data.skipping import batch_size_of
from gpd_cli.errors import TrainingError
from gpd_cli.forms import check_form, maybe, within

ENTRY = "epoch_length"
"""Key of `EpochLength.state` in checkpoints; checkpoints of earlier versions lack this entry."""
_COUNT = within(1, 2**53)


@dataclass(frozen=True)
class EpochLength:
    """How an epoch is divided into batches.

    Args:
        batches: number of batches in an epoch, per process; None if the data has no length.
        batch_size: number of images in a batch, per process; None if the loader does not tell.
        processes: number of processes that train together, each on batches of its own.
        accumulated: number of batches per update (gradient accumulation).
    """

    batches: int | None
    batch_size: int | None
    processes: int
    accumulated: int

    @classmethod
    def of(cls, trainer: Trainer) -> EpochLength:
        """Read the division from a trainer whose training data has been set up."""
        batches = trainer.num_training_batches
        return cls(
            None if batches == math.inf else int(batches),
            batch_size_of(trainer.train_dataloader),
            trainer.world_size,
            trainer.accumulate_grad_batches,
        )

    def state(self) -> dict[str, int | None]:
        """The fields as plain values, for a checkpoint."""
        return asdict(self)


def check_epoch_length(state: Any, place: str) -> None:
    """Check the form of a checkpoint's entry `ENTRY`.

    Raises:
        FormError: when the entry does not have the form of `EpochLength.state`.
    """
    maybe_count = maybe(_COUNT)
    form = {"batches": maybe_count, "batch_size": maybe_count}
    check_form(state, form | {"processes": _COUNT, "accumulated": _COUNT}, place)


def batches_done(done: int, before: EpochLength, now: EpochLength) -> int:
    """Convert a number of trained batches of an unfinished epoch to another division of the epoch.

    The result is rounded down to a whole number of updates, and leaves at least one update to make.
    Images lost by the rounding, fewer than one update takes, are seen a second time.

    Args:
        done: number of batches of the epoch that were trained under the old division, per process.
        before: the old division of the epoch.
        now: the new division of the epoch.

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


def take_up(state: Mapping[str, int | None], trainer: Trainer) -> None:
    """Convert a resumed run's batch counters to its own division of the epoch.

    If the division has changed, the run goes on at the same image and not at the same batch number.

    Args:
        state: `EpochLength.state` from the checkpoint.
        trainer: trainer of the resumed run, which has loaded the checkpoint's batch counters; these
            are changed in place.

    Raises:
        TrainingError: when it cannot be determined which images were seen.
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
    # A checkpoint may be written before or after Lightning counts its batch as completed.
    open_batches = current.processed - current.completed
    current.ready = current.started = current.processed = done
    current.completed = done - open_batches


def _check_stream(trainer: Trainer, before: EpochLength, now: EpochLength) -> None:
    """Refuse a stream if batch size or number of processes changed.

    Each process, and each of its workers, reads its own part of the stream, so that the order of
    the images depends on both numbers.
    """
    data = getattr(trainer.train_dataloader, "dataset", None)
    same = (before.batch_size, before.processes) == (now.batch_size, now.processes)
    if same or not isinstance(data, IterableDataset):
        return
    size = f"--data.batch_size {before.batch_size} and " if before.batch_size else ""
    raise TrainingError(
        "The checkpoint was written within an epoch of a stream, and its place in the epoch is "
        "known for the same batch size and number of devices only; go on with "
        f"{size}{before.processes} devices in all (--trainer.devices, --trainer.num_nodes), or "
        "from a checkpoint of the end of an epoch."
    )
