"""Static teachers: frozen networks to distil from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpd_cli.distributed.world import everywhere
from gpd_cli.errors import ModelError
from gpd_cli.models import ModelSpec, count_classes, input_shape, wants_published


@dataclass(frozen=True)
class StaticTeacherSettings:
    """A trained network that the student learns from.

    Args:
        name: name of the network, in any form that the student's name can have.
        weights: file with the network's state dict (.pth, .pt, .safetensors).
        args: further arguments of the network's constructor.
        stages: names of the modules whose outputs are the network's stages; found by default.
    """

    name: str | None = None
    weights: str | None = None
    args: dict[str, Any] | None = None
    stages: list[str] | None = None


class StaticTeacher:
    """A frozen network, always in eval mode.

    This class is no `nn.Module` on purpose: the network stays out of checkpoints, weight averages,
    optimizers and the broadcasts of DDP, and cannot be put into train mode along with the pair.

    Args:
        network: the network, which is changed: it is put into eval mode and frozen.
        shape: image shape that the network was made for, ``(C, H, W)``.
        stages: names of the modules whose outputs are the network's stages; found by default.
        title: name of the teacher in messages.
        weights: path of the file with its weights; None for those that its library publishes.

    Attributes:
        finite: whether all logits so far were finite, as a scalar tensor; None before the first
            batch.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, int, int],
        stages: Sequence[str] | None = None,
        title: str = "static teacher",
        weights: str | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.shape, self.stages, self.title = shape, stages, title
        self.weights = weights
        self.finite: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the teacher's logits, ``[B, classes]``, without a graph.

        The network is moved to the device and dtype of the images first.

        Args:
            images: a batch, ``[B, C, H, W]``.
        """
        weight = next(self.network.parameters())
        if weight.device != images.device or weight.dtype != images.dtype:
            self.network.to(images.device, images.dtype)
        with torch.no_grad():
            logits = cast(Tensor, self.network(images))
            # The value stays on the device, since reading it would wait for the GPU.
            finite = logits.isfinite().all()
            self.finite = finite if self.finite is None else self.finite & finite
            return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticTeacher:
        # Lightning's weight averaging copies the module that holds this teacher, which is frozen
        # and need not be copied.
        return self


def check_logits(teachers: Sequence[StaticTeacher], device: torch.device) -> None:
    """Check that all logits of static teachers so far were finite, in all processes.

    Args:
        teachers: the static teachers.
        device: device of the communication between processes.

    Raises:
        ModelError: when a teacher's logits were NaN or infinite; the message names the teacher.
    """
    for teacher in teachers:
        finite = torch.tensor(True) if teacher.finite is None else teacher.finite
        if not everywhere(finite.to(device)):
            raise ModelError(
                f"The logits of the {teacher.title} are NaN or infinite; check its weights, "
                "--data.mean, --data.std and --trainer.precision."
            )


def load_static_teachers(
    first: StaticTeacherSettings,
    assistants: Sequence[StaticTeacherSettings] | None,
    classes: int,
    channels: int,
) -> list[StaticTeacher]:
    """Load the static teacher and its assistants, if any.

    Args:
        first: settings of the static teacher; without a name there is none.
        assistants: settings of the assistants, further frozen networks.
        classes: the student's number of classes.
        channels: number of channels of the student's images.

    Returns:
        The static teacher, then the assistants; an empty list without a static teacher.

    Raises:
        ModelError: when a network does not suit the student, or has no name or no weights.
        WeightsError: when weights cannot be read or do not fit.
    """
    if first.name is None:
        if first.weights is not None:
            raise ModelError(
                "--model.static_teacher.weights needs the name of the network; add "
                "--model.static_teacher.name NAME."
            )
        if assistants:
            raise ModelError(
                "--model.assistants needs a static teacher; add --model.static_teacher.name NAME."
            )
        return []
    teachers = [_load(first, classes, channels, "static teacher")]
    for assistant in assistants or ():
        name = assistant.name
        if name is None or not (assistant.weights or wants_published(name, assistant.args)):
            raise ModelError(
                "A teacher assistant must be a trained network; give each of --model.assistants a "
                "name and weights."
            )
        teachers.append(_load(assistant, classes, channels, "assistant"))
    return teachers


def _load(settings: StaticTeacherSettings, classes: int, channels: int, kind: str) -> StaticTeacher:
    """Load one static teacher, and check its numbers of image channels and classes.

    Args:
        settings: settings of the static teacher.
        classes: the student's number of classes.
        channels: number of channels of the student's images.
        kind: what the teacher is called in messages: static teacher or assistant.
    """
    name, weights, args = settings.name, settings.weights, settings.args or {}
    assert name is not None
    if weights is None and not wants_published(name, args):
        raise ModelError(
            f"The {kind} {name} must be a trained network; add "
            "--model.static_teacher.weights FILE, or --model.static_teacher.args '{pretrained: "
            "true}' for published weights."
        )
    # With the role of a teacher, a classifier that does not fit is an error: one that was replaced
    # by a new classifier would teach noise.
    spec = ModelSpec(name, classes, args)
    network = spec.build(weights, role="teacher")
    shape = input_shape(network, name, args)
    spec.check_assumed(network, shape)
    found = count_classes(network, shape)
    if shape[0] != channels:
        raise ModelError(
            f"The {kind} {name} takes images of {shape[0]} channels but the student takes "
            f"{channels}; give one for the same images."
        )
    if found != classes:
        raise ModelError(
            f"The {kind} {name} has {found} classes but the student has {classes}; give one "
            "trained on the same classes."
        )
    source = "pretrained" if weights is None else Path(weights).name
    return StaticTeacher(
        network,
        shape,
        settings.stages,
        f"{kind} {name} ({source})",
        weights=weights,
    )
