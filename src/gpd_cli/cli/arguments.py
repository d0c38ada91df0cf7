"""Functions that read or rewrite a command line before the parser sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from gpd_cli.cli.yaml_limits import check_limits
from gpd_cli.data import ImageSpec
from gpd_cli.models import without_pretrained
from gpd_cli.recipes.names import configuration_path
from gpd_cli.teacher.checkpoint import image_spec, read_run

CONFIGURATION = ("-c", "--config")
IMAGE_DATA = "gpd_cli.data.ImageData"
"""Import path of the default data module."""
# Beginnings of the names of settings that only training uses.
_OF_TRAINING = ("static_", "assistants", "ce_weight", "method", "stages")
CHECKPOINT = "--ckpt_path"
_FLAGS = ("--dry_run", "--preprocess", "--fuse_bn", "--half")


def occurrences(arguments: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each occurrence of some options, with its value, in the order of the command line.

    Args:
        arguments: the command line.
        names: names of options, with their hyphens.
    """
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name in names:
            yield name, value if equals else following


def is_inline(value: str) -> bool:
    """Whether the value of ``-c`` is itself a configuration, such as ``{model: {ratio: 3}}``."""
    return re.match(r"\s*\{|[^/]*:\s", value) is not None


def options_of(arguments: Sequence[str], group: str) -> list[str]:
    """Keep only the configurations and the options of one group, in the order of the command line.

    Args:
        arguments: the command line, in which every option has a value.
        group: name of the group, such as ``trainer``; ``--trainer FILE`` counts as an option of the
            group as well.
    """
    found: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, _ = argument.partition("=")
        if name in CONFIGURATION or f"{name}.".startswith(f"--{group}."):
            found += [argument] if equals else [argument, following]
    return found


def with_values(arguments: Sequence[str]) -> list[str]:
    """Write ``=true`` after each flag that users may give without a value, such as ``--half``."""
    return [
        f"{argument}=true" if argument in _FLAGS and after.startswith("-") else argument
        for argument, after in zip_longest(arguments, arguments[1:], fillvalue="-")
    ]


def with_recipes(arguments: Sequence[str]) -> list[str]:
    """Replace each ``recipe:NAME`` on a command line by the path of the recipe's file.

    Args:
        arguments: the command line.

    Raises:
        RecipeError: when there is no such recipe.
    """
    found: list[str] = []
    for argument, before in zip(arguments, ["", *arguments[:-1]], strict=True):
        name, equals, value = argument.partition("=")
        if before in CONFIGURATION:
            argument = configuration_path(argument)
        elif equals and name in CONFIGURATION:
            argument = f"{name}={configuration_path(value)}"
        found.append(argument)
    return found


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
        if not name.startswith(("_", *_OF_TRAINING))
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


def configured(path: str, key: str) -> Any:
    """An entry of a configuration file; None if there is no such entry, or no readable file."""
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
        check_limits(text)
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the parser reports the error later
    return content.get(key) if isinstance(content, dict) else None
