"""The static teacher's classifier in the student's place (SimKD, Chen et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gpd_cli.errors import ModelError
from gpd_cli.expansion import Pair
from gpd_cli.features import find_places
from gpd_cli.models import ReusedClassifier
from gpd_cli.training.networks import Alone
from gpd_cli.training.static_teacher import StaticTeacher


def adopt_classifier(
    student: nn.Module, teachers: Sequence[StaticTeacher], shape: tuple[int, int, int]
) -> None:
    """Give a student that is built for it the first static teacher's classifier.

    Args:
        student: any network; only a `ReusedClassifier` is changed.
        teachers: the static teachers; without one the student keeps its own classifier.
        shape: of the images, ``(C, H, W)``.

    Raises:
        ModelError: when the teacher has no linear classifier, or one of another width.
    """
    if not isinstance(student, ReusedClassifier) or not teachers:
        return
    network = teachers[0].network
    name = find_places(network, shape, names=[]).classifier
    if name is None:
        raise ModelError(
            f"The static teacher ({type(network).__name__}) has no linear classifier to reuse; "
            "choose another one, or a student without simkd/."
        )
    classifier = network.get_submodule(name)
    assert isinstance(classifier, nn.Linear)
    student.adopt(classifier)


def freeze_classifier(network: Pair | Alone, teachers: Sequence[StaticTeacher]) -> None:
    """Keep a reused classifier, in student and dynamic teacher, as it is.

    Args:
        network: what is trained.
        teachers: the static teachers.
    """
    owner = network.teacher if isinstance(network, Pair) else network.network
    if teachers and isinstance(owner, ReusedClassifier):
        owner.classifier.requires_grad_(False)
