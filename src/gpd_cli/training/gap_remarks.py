"""Remarks on a gap that closes or runs away, each made once."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

_EPOCHS = 5  # a mean over so many
_WIDE = 20.0  # points
_LEARNED = 99.0  # per cent, from which on a teacher has nothing left to be better at


def remark_on_gap(gaps: Sequence[float], student: float) -> str | None:
    """What there is to say of a gap.

    Args:
        gaps: training gap of each epoch so far, in points.
        student: the student's accuracy in the last epoch, per cent.

    Returns:
        ``closed`` where the dynamic teacher has been no better than the student for some epochs,
        ``wide`` where it is far better and more and more so, or None.

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
    "closed": "For 5 epochs the dynamic teacher has been no better than the student (gap "
    "{gap:.1f} points): it teaches nothing new; a larger --model.ratio, more --model.branches or a "
    "smaller --model.gap_weight gives it room.",
    "wide": "The gap grows, and has been {gap:.1f} points in the mean of 5 epochs: the student "
    "does not keep up; a larger --model.gap_weight or a smaller --model.ratio brings it closer.",
}


class GapRemarks(Callback):
    """Make the remarks, after epochs of training."""

    def __init__(self) -> None:
        self._gaps: list[float] = []
        self._made: list[str] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the epoch's gap."""
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
        """What was said, and of what."""
        return {"gaps": self._gaps, "made": self._made}

    def load_state_dict(self, state_dict: dict[str, list[float] | list[str]]) -> None:
        """Go on where the run was."""
        self._gaps = [float(gap) for gap in state_dict["gaps"]]
        self._made = [str(made) for made in state_dict["made"]]
