"""Networks whose classes have another order are told from those that are merely bad."""

import pytest
import torch
from torch import Tensor

from gpd_cli.training.class_order import count_by_halves, find_class_order

CLASSES = 100
AS_TEXT = torch.tensor([int(name) for name in sorted(map(str, range(CLASSES)))])
"""The number that each output stands for in a network trained on folders 0, 1, 10, 11, ..."""


def images(per_class: int, classes: int = CLASSES) -> Tensor:
    """Labels, sorted by class as in a folder."""
    return torch.arange(classes).repeat_interleave(per_class)


def predicted(labels: Tensor, accuracy: float, classes: int = CLASSES) -> Tensor:
    """Predictions that are right with a probability, and any class otherwise."""
    torch.manual_seed(0)
    guesses = torch.randint(classes, labels.shape)
    return torch.where(torch.rand(labels.shape) < accuracy, labels, guesses)


@pytest.mark.parametrize(("per_class", "accuracy"), [(10, 0.75), (50, 0.75), (50, 0.3)])
def test_folders_sorted_as_text_are_found(per_class: int, accuracy: float) -> None:
    labels = images(per_class)
    assert (torch.arange(CLASSES) == AS_TEXT).sum() == 12  # these few keep their number
    outputs = AS_TEXT.argsort()[predicted(labels, accuracy)]
    order = find_class_order(count_by_halves(labels, outputs, CLASSES))
    assert order is not None
    assert order.accuracy > 80 * accuracy > 100 * float((outputs == labels).float().mean())
    right = sum(int(AS_TEXT[output]) == label for output, label in order.classes.items())
    assert right > 0.8 * 88


def test_two_classes_that_are_exchanged_are_named() -> None:
    labels = images(50, classes=10)
    outputs = predicted(labels, 0.9, classes=10)
    exchanged = torch.tensor([0, 1, 7, 3, 4, 5, 6, 2, 8, 9])[outputs]
    order = find_class_order(count_by_halves(labels, exchanged, 10))
    assert order is not None and order.classes == {2: 7, 7: 2}
    assert order.accuracy == pytest.approx(100 * float((outputs == labels).float().mean()))


@pytest.mark.parametrize("per_class", [1, 2, 10, 50])
@pytest.mark.parametrize("accuracy", [0.0, 0.08, 0.3, 0.75, 1.0])
def test_a_bad_network_in_the_given_order_is_just_bad(per_class: int, accuracy: float) -> None:
    labels = images(per_class)
    assert find_class_order(count_by_halves(labels, predicted(labels, accuracy), CLASSES)) is None


def test_classes_without_images_keep_their_number() -> None:
    labels = images(50, classes=4)
    outputs = torch.tensor([1, 0, 2, 3])[labels]
    order = find_class_order(count_by_halves(labels, outputs, CLASSES))
    assert order is not None and order.classes == {0: 1, 1: 0}
    assert find_class_order(torch.zeros(2, 3, 3, dtype=torch.long)) is None
