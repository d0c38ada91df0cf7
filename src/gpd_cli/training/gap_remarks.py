"""Remarks for the user on a gap that has closed or keeps growing, each printed once per run."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

_EPOCHS = 5  # number of epochs that the gap is averaged over
_WIDE = 20.0  # mean gap in points from which on the gap counts as wide
_LEARNED = 99.0  # student accuracy in percent beyond which no teacher can be much better


def remark_on_gap(gaps: Sequence[float], student: float) -> str | None:
    """Decide which remark a series of gaps calls for, if any.

    Args:
        gaps: training gap of each epoch so far, in points.
        student: the student's training accuracy in the last epoch, in percent.

    Returns:
        ``closed`` if the dynamic teacher was on average no better than the student in the last 5
        epochs; ``wide`` if the mean gap of the last 5 epochs is large and still growing; otherwise
        None.

    Example:
        >>> remark_on_gap([3, 1, 0, -0.5, 0, 0.1, -0.2], 60.0)
        'closed'
        >>> remark_on_gap([10, 12, 14, 16, 18, 20, 22, 24, 26, 28], 40.0)
        'wide'
    """
    recent, before = gaps[-_EPOCHS:], gaps[-2 * _EPOCHS : -_EPOCHS]
    if len(recent) == _EPOCHS and sum(recent) <= 0 and len(gaps) > _EPOCHS and student < _LEARNED:
        return "closed"
    if len(before) == _EPOCHS and sum(before) < sum(recent) >= _WIDE * _EPOCHS:
        return "wide"
    return None


_TEXTS = {
    "closed": "For 5 epochs the dynamic teacher has not been better than the student (gap "
    "{gap:.1f} points), so that the student learns nothing new from it; raise --model.ratio or "
    "--model.branches, or lower --model.gap_weight.",
    "wide": "The gap grows, since the student does not keep up with the dynamic teacher ({gap:.1f} "
    "points in the mean of 5 epochs); raise --model.gap_weight or lower --model.ratio.",
}


class GapRemarks(Callback):
    """Print the remarks at the end of training epochs."""

    def __init__(self) -> None:
        self._gaps: list[float] = []
        self._made: list[str] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's training gap to the series, and print a remark if one is called for."""
        values = trainer.callback_metrics
        if "train/gap" not in values:
            return
        self._gaps = [*self._gaps, float(values["train/gap"])][-2 * _EPOCHS :]
        kind = remark_on_gap(self._gaps, float(values["train/student_top1"]))
        if kind is not None and kind not in self._made:
            self._made.append(kind)
            recent = self._gaps[-_EPOCHS:]
            rank_zero_info(_TEXTS[kind].format(gap=sum(recent) / len(recent)))

    def state_dict(self) -> dict[str, list[float] | list[str]]:
        """The latest gaps, and the remarks that were printed, for the checkpoint."""
        return {"gaps": self._gaps, "made": self._made}

    def load_state_dict(self, state_dict: dict[str, list[float] | list[str]]) -> None:
        """Restore gaps and remarks of the run that is resumed."""
        self._gaps = [float(gap) for gap in state_dict["gaps"]]
        self._made = [str(made) for made in state_dict["made"]]
