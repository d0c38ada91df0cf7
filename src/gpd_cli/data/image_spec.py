"""Description of the images and classes of a trained network, needed wherever it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open

from gpd_cli.data.opening import resolved_name
from gpd_cli.data.transforms import Preprocessing


@dataclass(frozen=True)
class ImageSpec:
    """Classes, preprocessing and origin of the images that a network was trained on.

    The description is stored in checkpoints as plain values. Fields are None if they are not known:
    a user's own data module may provide nothing but batches.

    Args:
        class_names: names of the classes in the order of class numbers, which is the order of the
            logits.
        size: height and width of the network's images, in pixels.
        channels: number of channels, 1 (grey) or 3 (RGB); other images are converted.
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].
        crop_pct: in evaluation, the fraction of the resized image's shorter edge that the center
            crop keeps, as in timm: the image is resized to ``floor(size / crop_pct)``.
        interpolation: interpolation for resizing: nearest, bilinear, bicubic or lanczos.
        dataset: name of the data set, as for the option ``--data.dataset``.
        root: folder of the data set.
        classes: number of classes, if the classes have no names.
        draw: digest of what the random choice of held-out images depends on, the names of all
            images among others; None if no images were held out at random.
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
    draw: str | None = None

    def present_root(self, given: str | None) -> str | None:
        """The folder of the training's data, or the folder as it was given if the other is gone.

        Args:
            given: the folder as it was given in training. A path that is relative to the folder in
                which the training was started may mean other data elsewhere; an absolute path that
                exists is taken.
        """
        if given is None or self.root is None or str(Path(given).resolve()) == self.root:
            return given
        if Path(given).is_absolute() and Path(given).exists():
            return given
        if Path(self.root).exists():
            if Path(given).exists():
                rank_zero_info(f"The data is that of the training, in '{self.root}'.")
            return self.root
        if Path(given).exists():
            rank_zero_info(
                f"The data of the training, in '{self.root}', is gone; '{given}' is read."
            )
        return given

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, which JSON can hold."""
        plain = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> ImageSpec | None:
        """Make a description from the output of `to_dict`; None stays None.

        Unknown entries, which a later version may have written, are ignored.

        Args:
            values: the output of `to_dict`, or None.
        """
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
        cls,
        settings: Mapping[str, Any],
        class_names: Sequence[str] | None,
        draw: str | None = None,
    ) -> ImageSpec:
        """Describe the images of an `ImageData`.

        Args:
            settings: the arguments of the `ImageData`, by name.
            class_names: names of the classes in the order of class numbers; None for classes
                without names.
            draw: digest of the random choice of held-out images; None if there was none.
        """
        root = settings.get("root")
        dataset = resolved_name(settings["dataset"], root)
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
            # Digits fill the whole image, and so are resized but not cropped.
            crop_pct=1.0 if is_digits else steps.crop_pct,
            interpolation="bilinear" if is_digits else steps.interpolation,
            dataset=dataset,
            # An absolute path, since evaluations may run in another working directory. A root that
            # is not a local path is a URL.
            root=str(Path(root).resolve()) if root and Path(root).exists() else root,
            classes=settings.get("classes") if class_names is None else None,
            draw=draw,
        )

    @classmethod
    def of_export(cls, path: str | Path) -> ImageSpec | None:
        """Read the description from a file of weights that `extract` has written.

        Args:
            path: path of a file of weights.

        Returns:
            The description; None for files of other programs, and for damaged ones, which are
            reported when they are loaded.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
            classes, steps = (json.loads(header[name]) for name in ("classes", "preprocessing"))
            channels, *size = steps["input_size"]
            is_named = classes != [f"class {number}" for number in range(len(classes))]
            return cls(
                class_names=tuple(classes) if is_named else None,
                size=(size[0], size[1]),
                channels=channels,
                mean=tuple(steps["mean"]),
                std=tuple(steps["std"]),
                crop_pct=steps["crop_pct"],
                interpolation=steps["interpolation"],
                classes=None if is_named else len(classes),
            )
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None

    @classmethod
    def of(cls, data: Any) -> ImageSpec | None:
        """Describe the images of any data module; None if the data module tells nothing of them.

        Args:
            data: the data module. Its attributes ``image_spec``, or else ``class_names`` and
                ``image_shape``, are used if it has them.
        """
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
