"""The settings of a checkpoint's run, which are the defaults of commands that take a checkpoint."""

from __future__ import annotations

from typing import Any

from gpd_cli.cli.arguments import IMAGE_DATA
from gpd_cli.data import ImageSpec
from gpd_cli.models import without_pretrained
from gpd_cli.teacher.checkpoint import image_spec, read_run

# Beginnings of the names of settings that only training uses.
_TRAINING_ONLY = ("static_", "assistants", "ce_weight", "method", "stages")
# Settings that say how images are prepared, and the fields of `ImageSpec` with the same meaning. A
# network needs images prepared as in its training, from other data as well.
_PREPARATION = {
    "in_chans": "channels",
    **{name: name for name in ("mean", "std", "crop_pct", "interpolation")},
}


def settings_of_checkpoint(path: str) -> tuple[dict[str, Any], ImageSpec | None]:
    """Read the settings of model and data from a checkpoint.

    Settings that only training uses, such as the static teacher, are left out.

    Args:
        path: path of the checkpoint.

    Returns:
        The settings by name of the option (without hyphens), and the description of the images
        (classes and preprocessing), or None if the checkpoint has no such description.

    Raises:
        WeightsError: when the checkpoint cannot be read.
    """
    content = read_run(path)
    model, data = content["hyper_parameters"], content.get("datamodule_hyper_parameters", {})
    settings = {
        f"model.{name}": value
        for name, value in model.items()
        if not name.startswith(("_", *_TRAINING_ONLY))
    }
    if isinstance(args := settings.get("model.student_args"), dict):
        settings["model.student_args"] = without_pretrained(model["student"], args)
    arguments = {name: value for name, value in data.items() if not name.startswith("_")}
    spec = image_spec(content)
    if spec is not None and data.get("_class_path", IMAGE_DATA) == IMAGE_DATA:
        arguments |= _preparation(spec)
        if "root" in arguments:
            arguments["root"] = spec.present_root(arguments["root"])
    settings["data"] = {
        "class_path": data.get("_class_path", IMAGE_DATA),
        "init_args": arguments,
    }
    return settings, spec


def settings_of_weights(path: str) -> tuple[dict[str, Any], ImageSpec | None]:
    """Read how images are prepared, and the classes, from a file that `extract` has written.

    Args:
        path: path of a file of weights.

    Returns:
        As `settings_of_checkpoint`, with settings of the data only; nothing and None for files that
        do not have this description.
    """
    spec = ImageSpec.of_export(path)
    if spec is None or spec.size is None:
        return {}, None
    arguments = {"image_size": spec.size[0], **_preparation(spec)}
    return {"data": {"class_path": IMAGE_DATA, "init_args": arguments}}, spec


def _preparation(spec: ImageSpec) -> dict[str, Any]:
    """The settings of the data, by name, that say how images are prepared, as far as known."""
    found = {name: getattr(spec, field) for name, field in _PREPARATION.items()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if value is not None
    }
