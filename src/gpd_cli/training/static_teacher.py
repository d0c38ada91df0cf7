"""Frozen networks to distil from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpd_cli.errors import ModelError
from gpd_cli.models import ModelSpec, count_classes, input_shape
from gpd_cli.processes import everywhere


class StaticTeacher:
    """A frozen network, always in eval mode.

    It is no module on purpose: so it stays out of checkpoints, weight averages, optimizers and
    what DDP broadcasts, and nobody can put it into train mode.

    Args:
        network: taken over.
        shape: of the images it was made for, ``(C, H, W)``.
        stages: modules whose outputs are its stages; by default found.
        title: what messages call it.

    Attributes:
        finite: a scalar, whether all its logits so far were finite; None before the first ones.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, int, int],
        stages: Sequence[str] | None = None,
        title: str = "static teacher",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.shape, self.stages, self.title = shape, stages, title
        self.finite: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The teacher's logits, ``[B, C]``, without gradient."""
        weight = next(self.network.parameters())
        if weight.device != images.device or weight.dtype != images.dtype:
            self.network.to(images.device, images.dtype)
        with torch.no_grad():
            logits = cast(Tensor, self.network(images))
            # Noted, not looked at: that would wait for the GPU.
            finite = logits.isfinite().all()
            self.finite = finite if self.finite is None else self.finite & finite
            return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticTeacher:
        # Lightning's weight averaging copies the module that holds it.
        return self


def check_logits(teachers: Sequence[StaticTeacher], device: torch.device) -> None:
    """Check that all logits of static teachers so far were finite, in all processes.

    Args:
        teachers: the static teachers.
        device: that processes talk over; one may have seen no images yet.

    Raises:
        ModelError: when those of one were not; it is named.
    """
    for teacher in teachers:
        finite = torch.tensor(True) if teacher.finite is None else teacher.finite
        if not everywhere(finite.to(device)):
            raise ModelError(
                f"The logits of the {teacher.title} are NaN or infinite; check its weights, "
                "--data.mean, --data.std and --trainer.precision."
            )


def load_static_teacher(
    name: str | None,
    weights: str | Path | None,
    model_args: dict[str, Any] | None,
    classes: int,
    channels: int,
    stages: Sequence[str] | None = None,
    kind: str = "static teacher",
) -> StaticTeacher | None:
    """Load a static teacher and check that it tells the student's classes apart.

    Args:
        name: the network; None for no static teacher.
        weights: its state dict.
        model_args: further arguments of its constructor.
        classes: the student's number of classes.
        channels: of the student's images.
        stages: modules whose outputs are its stages; by default found.
        kind: what it is, for messages.

    Raises:
        ModelError: when it has other classes or channels, or one of network and weights is missing.
        WeightsError: when the weights cannot be read or do not fit.
    """
    if name is None:
        if weights is not None:
            raise ModelError(
                "--model.static_teacher_weights needs the network they are for: add "
                "--model.static_teacher NAME."
            )
        return None
    if weights is None:
        raise ModelError(
            f"The static teacher {name} has to be a trained one: add "
            "--model.static_teacher_weights FILE."
        )
    network = ModelSpec(name, classes, model_args or {}).build(weights)
    shape = input_shape(network, name, model_args or {})
    found = count_classes(network, shape)
    if shape[0] != channels:
        raise ModelError(
            f"The static teacher {name} takes images of {shape[0]} channels but the student of "
            f"{channels}; give a static teacher for the same images."
        )
    if found != classes:
        raise ModelError(
            f"The static teacher {name} has {found} classes but the student has {classes}; give "
            "a static teacher trained on the same classes."
        )
    return StaticTeacher(network, shape, stages, f"{kind} {name} ({Path(weights).name})")


def load_static_teachers(
    name: str | None,
    weights: str | Path | None,
    model_args: dict[str, Any] | None,
    assistants: Sequence[Mapping[str, Any]] | None,
    classes: int,
    channels: int,
    stages: Sequence[str] | None = None,
) -> list[StaticTeacher]:
    """Load a static teacher and the assistants beside it.

    Args:
        name: see `load_static_teacher`.
        weights: see there.
        model_args: see there.
        assistants: further frozen networks, each with ``name``, ``weights`` and, if it needs them,
            ``args`` and ``stages``.
        classes: the student's number of classes.
        channels: of the student's images.
        stages: modules whose outputs are the static teacher's stages; by default found.

    Returns:
        The static teacher first; nothing at all without one.

    Raises:
        ModelError: when one does not suit the student, or an assistant is not described so.
        WeightsError: when weights cannot be read or do not fit.
    """
    first = load_static_teacher(name, weights, model_args, classes, channels, stages)
    if first is None:
        if assistants:
            raise ModelError(
                "Teacher assistants stand between a static teacher and the student: add "
                "--model.static_teacher NAME."
            )
        return []
    teachers = [first]
    for assistant in assistants or ():
        found = load_static_teacher(
            **_described(assistant), classes=classes, channels=channels, kind="assistant"
        )
        if found is not None:
            teachers.append(found)
    return teachers


def _described(assistant: Any) -> dict[str, Any]:
    """How an assistant is loaded.

    Raises:
        ModelError: when it is not described as it should be.
    """
    given = assistant if isinstance(assistant, Mapping) else {}
    described = bool(given.get("name") and given.get("weights"))
    stages = given.get("stages")
    if (
        not described
        or not given.keys() <= {"name", "weights", "args", "stages"}
        or not isinstance(stages, list | None)
    ):
        raise ModelError(
            "A teacher assistant is described by name, weights and, if need be, args and a list of "
            f"stages, not by {assistant!r}."
        )
    return {
        "name": given["name"],
        "weights": given["weights"],
        "model_args": given.get("args"),
        "stages": stages,
    }
