"""The description of a network by which checkpoints rebuild it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn
from torch.nn.parameter import is_lazy

from gpd_cli.errors import ModelError
from gpd_cli.models.factory import Role, create_model
from gpd_cli.models.inputs import count_classes, input_shape, probe
from gpd_cli.models.name_prefixes import REUSED, is_of_torchvision
from gpd_cli.models.own import check_repeatable
from gpd_cli.models.published import without_pretrained


@dataclass(frozen=True)
class ModelSpec:
    """A description of a network, from which the network can be rebuilt. Checkpoints contain it.

    Args:
        name: name of the network, see `create_model`.
        num_classes: number of classes; None for the network's default.
        model_args: further arguments of the network's constructor, as plain JSON values (tuples
            become lists).

    Raises:
        ModelError: when an argument is no plain value.
    """

    name: str
    num_classes: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            # Values are converted now, so that the network is built from the same values now as
            # later from a checkpoint.
            plain = json.loads(json.dumps(dict(self.model_args), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"The model arguments of {self.name} must be numbers, strings, true, false, null, "
                f"lists or mappings of these: {error}."
            ) from error
        object.__setattr__(self, "model_args", plain)

    def build(self, weights: str | Path | None = None, *, role: Role = "student") -> nn.Module:
        """Build the network by `create_model`, which has the same arguments and errors.

        Args:
            weights: a state dict to load.
            role: what the network is for.
        """
        return create_model(
            self.name,
            num_classes=self.num_classes,
            weights=weights,
            model_args=self.model_args,
            role=role,
        )

    def resolve(self, model: nn.Module, shape: tuple[int, int, int] | None = None) -> ModelSpec:
        """Make the description by which checkpoints rebuild this network, before loading weights.

        It states the network's number of classes, and asks for no published weights.

        Args:
            model: a network that was built from this description.
            shape: shape of the images, ``(C, H, W)``; by default that for which the network was
                made.

        Raises:
            ModelError: when the network has another number of classes than the description; when
                the network does not say which images it takes, and does not take usual ones; or
                when a user's own network has random numbers that are not in its state dict.
        """
        if shape is None:
            shape = input_shape(model, self.name, self.model_args)
            self.check_assumed(model, shape)
        classes = count_classes(model, shape)
        if self.num_classes not in (None, classes):
            raise ModelError(
                f"{self.name} has {classes} classes and not {self.num_classes}; let it take the "
                f"argument num_classes, or set --model.num_classes {classes}."
            )
        args = without_pretrained(self.name, self.model_args)
        resolved = replace(self, num_classes=classes, model_args=args)
        if not (is_of_torchvision(self.name) or timm.is_model(self.name.removeprefix(REUSED))):
            check_repeatable(self.name, resolved.build)
        return resolved

    def check_assumed(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        """Check the assumed image shape of a network if neither network nor arguments state any.

        Args:
            model: a network that was built from this description.
            shape: the image shape that is assumed, ``(C, H, W)``.

        Raises:
            ModelError: when the network does not take such images.
        """
        config = getattr(model, "pretrained_cfg", None) or {}
        stated = config.get("input_size") or self.model_args.get("img_size")
        # A lazy network would take its widths from the images of this check. It is left out, since
        # its expansion is refused anyway.
        if stated or is_of_torchvision(self.name) or any(is_lazy(p) for p in model.parameters()):
            return
        try:
            probe(model, shape)
        except ModelError as error:
            raise ModelError(
                f"{str(error).removesuffix('.')}; if it takes images of another shape, state the "
                "shape in its class, such as by pretrained_cfg = {'input_size': (1, 16, 16)}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON values."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "model_args": json.loads(json.dumps(self.model_args)),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Rebuild a description from the output of `to_dict`.

        Args:
            values: the description as plain values.

        Raises:
            ModelError: when a value is missing, unknown or has a wrong type.
        """
        try:
            spec = cls(**values)
        except TypeError as error:
            raise ModelError(
                f"The description of a model is not valid ({error}): {values!r}."
            ) from error
        classes = spec.num_classes
        if not isinstance(spec.name, str) or not isinstance(classes, int | None):
            raise ModelError(f"The description of a model is not valid: {values!r}.")
        return spec
