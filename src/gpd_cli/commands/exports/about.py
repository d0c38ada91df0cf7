"""Description of an exported network, written beside its weights.

It consists of architecture, classes and preprocessing, as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import timm

from gpd_cli.data import ImageSpec
from gpd_cli.files import json_text
from gpd_cli.models import ModelSpec
from gpd_cli.package_version import gpd_version

Which = Literal["student", "teacher"]
# Arguments that tell timm where weights lie on the machine that trained the network.
_PLACES = ("cache_dir", "checkpoint_path")


@dataclass(frozen=True)
class About:
    """Description of an exported network.

    Args:
        spec: architecture of the student.
        network: which of the two networks is exported.
        shape: shape of the network's images, ``(C, H, W)``.
        images: classes and preprocessing, as far as the checkpoint knows them.
        arguments: constructor arguments that build the exported network; None if no arguments do.
        facts: further texts for the model card, such as the accuracy, by title.
        settings: the run's configuration in YAML, for the model card; empty without one.
        left_out: what the configuration lacks, as a part of a sentence.
    """

    spec: ModelSpec
    network: Which
    shape: tuple[int, int, int]
    images: ImageSpec | None = None
    arguments: Mapping[str, Any] | None = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    left_out: str = ""

    @cached_property
    def classes(self) -> list[str]:
        """A class name for each logit; ``class N`` if the checkpoint has no names."""
        count = self.spec.num_classes or 0
        known = self.images.class_names if self.images is not None else None
        if known is not None and len(known) == count:
            return list(known)
        return [f"class {number}" for number in range(count)]

    @property
    def has_class_names(self) -> bool:
        """Whether the class names come from the data."""
        return bool(self.images and self.images.class_names) and (
            list(self.images.class_names or ()) == self.classes  # type: ignore[union-attr]
        )

    @cached_property
    def preprocessing(self) -> dict[str, Any] | None:
        """Preprocessing of the images under timm's names; None if the checkpoint lacks it."""
        images = self.images
        if images is None or images.mean is None or images.std is None:
            return None
        return {
            "input_size": list(self.shape),
            "mean": list(images.mean),
            "std": list(images.std),
            "interpolation": images.interpolation or "bilinear",
            "crop_pct": images.crop_pct or 1.0,
            "crop_mode": "center",
        }

    @cached_property
    def building_arguments(self) -> dict[str, Any] | None:
        """Arguments that build the network, beside its name and number of classes.

        These are `arguments` without ``num_classes`` and without paths of weights; None if no
        arguments build the network.
        """
        if self.arguments is None:
            return None
        dropped = ("num_classes", *(_PLACES if timm.is_model(self.spec.name) else ()))
        return {key: value for key, value in self.arguments.items() if key not in dropped}

    def strings(self) -> dict[str, str]:
        """The whole description as JSON texts by name, for formats whose metadata are strings."""
        model = {**self.spec.to_dict(), "model_args": self.building_arguments}
        values: dict[str, Any] = {
            "model": model,
            "classes": self.classes,
            **({} if self.preprocessing is None else {"preprocessing": self.preprocessing}),
        }
        texts = {name: json_text(value) for name, value in values.items()}
        return {**texts, "network": self.network, "writer": f"gpd {gpd_version()}"}
