"""The networks of a run: a student with its dynamic teacher or on its own, and a frozen teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpd_cli.errors import ModelError
from gpd_cli.expansion import Pair, expand
from gpd_cli.models import ModelSpec, count_classes, input_shape

_PROBE_BATCH = 2


class Alone(nn.Module):
    """A student without a dynamic teacher: plain training, with the interface of `Pair`."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.network = student

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """The student's logits, ``[B, C]``, and None for those of a dynamic teacher."""
        return self.network(images), None

    def student(self, images: Tensor) -> Tensor:
        """The student's logits, ``[B, C]``."""
        return cast(Tensor, self.network(images))

    def extract(self) -> nn.Module:
        """A copy of the student."""
        return copy.deepcopy(self.network)


def with_teacher(
    student: nn.Module,
    shape: tuple[int, int, int],
    *,
    ratio: float,
    branches: int | str | Sequence[str],
    exclude: str | Sequence[str] | None = None,
    **options: Any,
) -> Pair | Alone:
    """Grow a student's dynamic teacher, or leave it alone where the two would be the same.

    Args:
        student: the network to train.
        shape: of its images, ``(C, H, W)``.
        ratio: see `gpd_cli.expand`.
        branches: see there.
        exclude: see `layer_patterns`.
        options: further options of `gpd_cli.expand`.

    Raises:
        ExpansionError: when the student cannot be expanded exactly.
    """
    if ratio == 1 and branches in (1, ["kxk"]):
        return Alone(student)
    sample = torch.zeros(_PROBE_BATCH, *shape)
    return expand(
        student,
        sample=sample,
        ratio=ratio,
        branches=branches,
        exclude=layer_patterns(exclude),
        **options,
    )


def layer_patterns(exclude: str | Sequence[str] | None) -> tuple[str, ...]:
    """Patterns of layer names as a user gives them: one, several with commas, or a list.

    Args:
        exclude: what was given.

    Example:
        >>> layer_patterns("layer4.*")
        ('layer4.*',)
        >>> layer_patterns("[*.conv1, head]")  # no YAML: a star begins an alias there
        ('*.conv1', 'head')
    """
    if not isinstance(exclude, str):
        return tuple(exclude or ())
    if exclude.startswith("[") and exclude.endswith("]"):
        exclude = exclude[1:-1]
    patterns = (pattern.strip().strip("'\"") for pattern in exclude.split(","))
    return tuple(pattern for pattern in patterns if pattern)


def summary(name: str, network: Pair | Alone) -> str:
    """One line on what is trained.

    Args:
        name: of the student.
        network: what is trained.
    """
    student = sum(p.numel() for p in network.extract().parameters())
    text = f"{name}: {student:,} parameters"
    certificate = network.certificate if isinstance(network, Pair) else None
    if certificate is None:
        return f"{text}, trained alone"
    trained = sum(p.numel() for p in network.parameters())
    return (
        f"{text}; with its dynamic teacher {trained:,}; their logits differ by "
        f"{certificate.difference:.0e} (relative, float64) at the start"
    )


class StaticTeacher:
    """A frozen network, always in eval mode.

    It is no module on purpose: so it stays out of checkpoints, weight averages, optimizers and
    what DDP broadcasts, and nobody can put it into train mode.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        """The teacher's logits, ``[B, C]``, without gradient."""
        weight = next(self.network.parameters())
        if weight.device != images.device or weight.dtype != images.dtype:
            self.network.to(images.device, images.dtype)
        with torch.no_grad():
            return cast(Tensor, self.network(images))

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticTeacher:
        # Lightning's weight averaging copies the module that holds it.
        return self


def load_static_teacher(
    name: str | None,
    weights: str | Path | None,
    model_args: dict[str, Any] | None,
    classes: int,
    channels: int,
) -> StaticTeacher | None:
    """Load a static teacher and check that it tells the student's classes apart.

    Args:
        name: the network; None for no static teacher.
        weights: its state dict.
        model_args: further arguments of its constructor.
        classes: the student's number of classes.
        channels: of the student's images.

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
    return StaticTeacher(network)
