"""Detection of networks that seem inaccurate because their classes are numbered in another order.

The accuracy alone does not reveal this: if folders 0 to 99 are sorted as 0, 1, 10, 11, ..., a few
classes keep their numbers, so that a network trained on the folders in this order is still more
accurate than chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MAX_CLASSES = 2000
"""Networks with more classes are not examined: the ``[C, C]`` counts would fill the memory."""

_POINTS = 2.0  # smallest gain of accuracy, in points, for another order to be reported
_DEVIATIONS = 3  # smallest gain of accuracy in standard deviations


@dataclass(frozen=True)
class ClassOrder:
    """An order of the classes under which a network is far more accurate.

    Args:
        accuracy: accuracy in percent under this order, on images other than those that the order
            was found on.
        classes: for each output whose class changes, the class that it stands for; outputs that are
            never the largest are left out.
    """

    accuracy: float
    classes: dict[int, int]


def count_by_halves(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Make two confusion matrices: one of the images at even positions, one of those at odd ones.

    Args:
        labels: classes of the images, ``[N]``.
        predictions: index of the largest output for each image, ``[N]``.
        num_classes: number of classes, C.

    Returns:
        Numbers of images by half, label and prediction, ``[2, C, C]``. Since every other image goes
        to the second half, both halves have images of all classes even if the images are sorted by
        class.
    """
    halves = torch.arange(len(labels), device=labels.device) % 2
    places = (halves * num_classes + labels) * num_classes + predictions
    shape = (2, num_classes, num_classes)
    return torch.bincount(places, minlength=math.prod(shape)).view(shape)


def find_class_order(counts: Tensor) -> ClassOrder | None:
    """Find a one-to-one renaming of classes under which a network is far more accurate.

    With few images, some renaming fits by chance. So each half of the images is scored with the
    renaming that is best on the other half.

    Args:
        counts: the output of `count_by_halves`, ``[2, C, C]``.

    Returns:
        The better order; None if no order is better than the given one by more than chance.

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
    """The best class for each output, ``[C]``; the output's own number wins a tie.

    Args:
        counts: numbers of images by label and prediction, ``[C, C]``.
    """
    number = len(counts)
    # A bonus on the diagonal decides ties: summed over all classes, it is less than one image.
    worth = counts * (number + 1) + np.eye(number, dtype=counts.dtype)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    classes = np.empty(number, dtype=int)
    classes[columns] = rows
    return classes
