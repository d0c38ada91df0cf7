"""Accuracies of student and dynamic teacher, and the gap between the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Scores(nn.Module):
    """Accuracies in percent over the batches seen so far.

    Args:
        networks: names of the networks that are scored, such as ``student`` and ``teacher``.
        num_classes: number of classes; there is a top-5 accuracy only for more than five classes.
    """

    def __init__(self, networks: Sequence[str], num_classes: int) -> None:
        super().__init__()
        ranks = [k for k in (1, 5) if k < num_classes or k == 1]
        self.metrics = nn.ModuleDict(
            {
                f"{network}_top{k}": MulticlassAccuracy(
                    num_classes, top_k=k, average="micro", validate_args=False
                )
                for network in networks
                for k in ranks
            }
        )

    def update(self, logits: Mapping[str, Tensor], labels: Tensor) -> None:
        """Count the correct predictions of a batch.

        Args:
            logits: logits by network, ``[B, C]`` each.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``, of which the largest counts.
        """
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        for name, metric in self.named_metrics():
            metric.update(logits[name.rpartition("_")[0]], classes)

    def compute(self) -> dict[str, Tensor]:
        """Accuracies in percent by name; ``gap`` is teacher's minus student's top-1, in points."""
        scores = {name: 100 * metric.compute() for name, metric in self.named_metrics()}
        if "teacher_top1" in scores:
            scores["gap"] = scores["teacher_top1"] - scores["student_top1"]
        return scores

    @property
    def has_images(self) -> bool:
        """Whether any batch was counted, in this process."""
        return all(metric.update_called for _, metric in self.named_metrics())

    def reset(self) -> None:
        """Forget all batches that were counted."""
        for _, metric in self.named_metrics():
            metric.reset()

    def named_metrics(self) -> list[tuple[str, MulticlassAccuracy]]:
        """The metrics by their names, such as ``student_top1``."""
        return [(name, cast(MulticlassAccuracy, metric)) for name, metric in self.metrics.items()]


class RunningAccuracy:
    """Moving average of top-1 accuracies for the progress bar; not synchronized and not logged.

    Attributes:
        values: accuracy in percent by network: scalar tensors on the training device; they are
            moved to the CPU only when a bar is drawn, since reading one waits for the device.
    """

    _MEMORY = 0.95

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def update(self, logits: Mapping[str, Tensor], labels: Tensor) -> None:
        """Update the moving averages with a batch.

        Args:
            logits: logits by network, ``[B, C]`` each.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``, of which the largest counts.
        """
        classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
        for name, value in logits.items():
            now = 100 * (value.argmax(dim=1) == classes).float().mean()
            last = self.values.get(name, now)
            self.values[name] = self._MEMORY * last + (1 - self._MEMORY) * now

    def shown(self) -> dict[str, Tensor]:
        """Accuracies in percent by network, and the gap in points if there is a teacher."""
        shown = dict(self.values)
        if "teacher" in shown:
            shown["gap"] = shown["teacher"] - shown["student"]
        return shown
