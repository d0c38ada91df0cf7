"""Static-teacher methods: what student and dynamic teacher learn from a frozen network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gpd_cli.errors import GpdError
from gpd_cli.losses.functional import dkd_loss, kd_loss


class StaticTeacherLoss(Protocol):
    """A distillation loss between a trained network and the static teacher."""

    def __call__(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar, of logits ``[B, C]``, teacher's logits ``[B, C]`` and labels."""


@dataclass(frozen=True)
class KD:
    """Knowledge distillation (Hinton et al., 2015).

    Args:
        temperature: softens both distributions.
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """See `kd_loss`; labels are not used."""
        return kd_loss(logits, teacher, self.temperature)


@dataclass(frozen=True)
class DKD:
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022); defaults of GPD's ResNet-18 run.

    Args:
        alpha: weight of the target-class term.
        beta: weight of the non-target term (0.5 for ResNet-18, 2 for MobileNet V1).
        temperature: softens both distributions.
    """

    alpha: float = 1.0
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """See `dkd_loss`."""
        return dkd_loss(logits, teacher, labels, self.alpha, self.beta, self.temperature)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise GpdError(f"The temperature must be more than 0, not {temperature}.")


METHODS: dict[str, type[StaticTeacherLoss]] = {"kd": KD, "dkd": DKD}
"""The methods by the name they have on the command line."""


def make_method(name: str, settings: Mapping[str, Any] | None = None) -> StaticTeacherLoss:
    """Make a static-teacher loss.

    Args:
        name: a key of `METHODS`.
        settings: its settings, such as ``{"temperature": 4.0}``.

    Raises:
        GpdError: when the name or a setting is unknown.
    """
    if name not in METHODS:
        raise GpdError(f"Unknown distillation method '{name}': choose one of {sorted(METHODS)}.")
    try:
        return METHODS[name](**(settings or {}))
    except TypeError as error:
        raise GpdError(f"Method '{name}' does not take these settings: {error}.") from error
