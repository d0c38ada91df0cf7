"""Whether a network that looks bad is a good one whose classes are numbered in another order.

Folders 0 to 99 in the order 0, 1, 10, 11, ... leave a few classes their number, and a network that
was trained on them is right more often than one that guesses: its accuracy does not tell why it is
bad.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MAX_CLASSES = 2000
"""Networks with more classes are not looked at: the counts of all pairs would fill the memory."""

_POINTS = 2.0  # what another order has to gain at least
_DEVIATIONS = 3  # and by how many standard deviations


@dataclass(frozen=True)
class ClassOrder:
    """An order of the classes under which a network is right far more often.

    Args:
        accuracy: accuracy under this order, in percent, on images that did not serve to find it.
        classes: the class that each output stands for, by output, where that is another one;
            outputs that are never the largest are left out.
    """

    accuracy: float
    classes: dict[int, int]


def count_by_halves(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count labels and predictions, of every other image apart.

    Args:
        labels: classes of images, ``[N]``.
        predictions: largest outputs for these images, ``[N]``.
        num_classes: number of classes, C.

    Returns:
        Numbers of images by half, class and prediction, ``[2, C, C]``. Both halves have images of
        all classes if the images are sorted by class.
    """
    halves = torch.arange(len(labels), device=labels.device) % 2
    places = (halves * num_classes + labels) * num_classes + predictions
    shape = (2, num_classes, num_classes)
    return torch.bincount(places, minlength=math.prod(shape)).view(shape)


def find_class_order(counts: Tensor) -> ClassOrder | None:
    """Find a one-to-one renaming of classes under which a network is right far more often.

    With few images a renaming fits by chance, so each half of the images is scored by the
    renaming that is best on the other half.

    Args:
        counts: numbers of images, as `count_by_halves` returns them.

    Returns:
        The order; None if none is better than the given one by more than chance.

    Example:
        >>> labels = torch.arange(4).repeat(100).sort().values
        >>> find_class_order(count_by_halves(labels, (labels + 1) % 4, 4))
        ClassOrder(accuracy=100.0, classes={0: 3, 1: 0, 2: 1, 3: 2})
        >>> find_class_order(count_by_halves(labels, labels, 4)) is None
        True
    """
    halves = counts.cpu().numpy()
    images = int(halves.sum())
    if images == 0:
        return None
    outputs = np.arange(halves.shape[1])
    won = lost = right = 0
    for seen, unseen in ((0, 1), (1, 0)):
        classes = _best_classes(halves[seen])
        moved = classes != outputs
        right += int(halves[unseen][classes, outputs].sum())
        won += int(halves[unseen][classes, outputs][moved].sum())
        lost += int(halves[unseen][outputs, outputs][moved].sum())
    gained = won - lost
    if 100 * gained < _POINTS * images or gained < _DEVIATIONS * math.sqrt(won + lost):
        return None
    total = halves.sum(axis=0)
    classes = _best_classes(total)
    moved = (classes != outputs) & (total[classes, outputs] > 0)
    return ClassOrder(
        accuracy=100 * right / images,
        classes={int(k): int(classes[k]) for k in outputs[moved]},
    )


def _best_classes(counts: np.ndarray) -> np.ndarray:
    """The class that each output stands for best, ``[C]``; among equals, the given one."""
    number = len(counts)
    # The diagonal is worth less than one image for all classes together.
    worth = counts * (number + 1) + np.eye(number, dtype=counts.dtype)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    classes = np.empty(number, dtype=int)
    classes[columns] = rows
    return classes
