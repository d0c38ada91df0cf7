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
        found = {name: getattr(spec, field) for name, field in _PREPARATION.items()}
        arguments |= {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }
    settings["data"] = {
        "class_path": data.get("_class_path", IMAGE_DATA),
        "init_args": arguments,
    }
    return settings, spec
