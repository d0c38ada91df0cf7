"""The images of ``gpd predict --images``, which need no data set."""

from __future__ import annotations

import inspect
from dataclasses import replace

from jsonargparse import Namespace

from gpd_cli.cli.arguments import IMAGE_DATA
from gpd_cli.data import ImageData
from gpd_cli.data.folders import ALL
from gpd_cli.data.image_spec import ImageSpec
from gpd_cli.errors import DataError


def pictures_as_data(config: Namespace, spec: ImageSpec | None) -> None:
    """Make the images of the option ``--images`` the data of `predict`.

    The images, which may lie anywhere below a folder, are prepared as those of training were.

    Args:
        config: settings of `predict`; its ``data`` is replaced.
        spec: how the images of training were prepared; None if the checkpoint does not say it.

    Raises:
        DataError: when there is no such image or folder, or it is not known how the images of
            training were prepared.
    """
    if not config.images.exists():
        raise DataError(
            f"--images {config.images}: there is no such image or folder; check the path."
        )
    data = config.data
    if data.class_path != IMAGE_DATA and (spec is None or None in (spec.mean, spec.size)):
        raise DataError(
            "--images needs to know how images are prepared, but the image_spec of "
            f"{data.class_path} is missing or incomplete; leave out --images, and load the images "
            "in the data module's predict_dataloader."
        )
    if data.class_path != IMAGE_DATA:
        assert spec is not None and spec.size is not None
        parameters = inspect.signature(ImageData).parameters.values()
        settings = {parameter.name: parameter.default for parameter in parameters} | {
            "image_size": spec.size[0],
            "in_chans": spec.channels,
            "mean": list(spec.mean or ()),
            "std": list(spec.std or ()),
            "crop_pct": spec.crop_pct or 1.0,  # exports have the same values for unknown ones
            "interpolation": spec.interpolation or "bilinear",
        }
        config.data = Namespace(class_path=IMAGE_DATA, init_args=Namespace(**settings))
    for name, value in (("dataset", "folder"), ("root", str(config.images))):
        config.data.init_args[name] = value
    config.data.init_args.test_split = ALL


def with_classes(spec: ImageSpec | None, count: int) -> ImageSpec:
    """The description of the images of training, which knows at least the number of classes.

    Pictures name no classes, since their folders may be called as one likes.

    Args:
        spec: the description from the checkpoint or the file of weights; None if it has none.
        count: the number of the network's classes.
    """
    spec = spec or ImageSpec()
    is_known = spec.class_names is not None or spec.classes is not None
    return spec if is_known else replace(spec, classes=count)
