"""What a trained network needs to know of its images and classes wherever it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gpd_cli.data.opening import understood
from gpd_cli.data.transforms import Preprocessing


@dataclass(frozen=True)
class ImageSpec:
    """Classes, preprocessing and origin of the images a network was trained on.

    It travels in checkpoints, as plain values. What is not known is None: a data module of a
    user's own may tell nothing but batches.

    Args:
        class_names: names in the order of class numbers, which is that of the logits.
        size: height and width that the network sees, pixels.
        channels: 1 (grey) or 3 (RGB); images are converted.
        mean: per channel, of values in [0, 1].
        std: per channel, likewise.
        crop_pct: in evaluation, the share of the resized image's shorter edge that the center crop
            keeps, as timm means it: an image is resized to ``floor(size / crop_pct)``.
        interpolation: how images are resized: nearest, bilinear, bicubic or lanczos.
        dataset: the data set, as ``--data.dataset`` has it.
        root: the folder that it was in.
        classes: the number of classes, where they have no names.
    """

    class_names: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    dataset: str | None = None
    root: str | None = None
    classes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON)."""
        plain = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> ImageSpec | None:
        """Read what `to_dict` wrote, also in a later version; None stays None."""
        if values is None:
            return None
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
        return cls(**given)

    @classmethod
    def of_settings(
        cls, settings: Mapping[str, Any], class_names: Sequence[str] | None
    ) -> ImageSpec:
        """Describe the images of an `ImageData`.

        Args:
            settings: its options.
            class_names: names in the order of class numbers; None for classes without names.
        """
        root = settings.get("root")
        dataset = understood(settings["dataset"], root)
        known = {field.name for field in fields(Preprocessing)}
        given = {key: value for key, value in settings.items() if key in known}
        is_digits = dataset == "digits"
        given["in_chans"] = given.get("in_chans") or (1 if is_digits else 3)
        steps = Preprocessing(**given)
        mean, std = steps.statistics
        return cls(
            class_names=None if class_names is None else tuple(class_names),
            size=(steps.image_size, steps.image_size),
            channels=steps.in_chans,
            mean=tuple(mean),
            std=tuple(std),
            # Digits fill their frame, and are resized only.
            crop_pct=1.0 if is_digits else steps.crop_pct,
            interpolation="bilinear" if is_digits else steps.interpolation,
            dataset=dataset,
            # The evaluation may run elsewhere. What is not there is an address.
            root=str(Path(root).resolve()) if root and Path(root).exists() else root,
            classes=settings.get("classes") if class_names is None else None,
        )

    @classmethod
    def of(cls, data: Any) -> ImageSpec | None:
        """What a data module tells of its images: its `image_spec`, or the names of its classes."""
        spec = getattr(data, "image_spec", None)
        if isinstance(spec, cls):
            return spec
        names = getattr(data, "class_names", None)
        shape = getattr(data, "image_shape", None)
        if names is None and shape is None:
            return None
        return cls(
            class_names=None if names is None else tuple(str(name) for name in names),
            size=None if shape is None else (int(shape[1]), int(shape[2])),
            channels=None if shape is None else int(shape[0]),
        )
