"""The model card, which describes an exported network to people who did not train it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import timm
import torch
import yaml

from gpd_cli.commands.exports.about import About
from gpd_cli.package_version import gpd_version

_SHOWN = 20  # most class names that the card lists
# Settings with paths that are of no use on other machines than the one that trained the network.
_PRIVATE = ("root", "student_weights", "weights", "cache_dir", "dirpath")
_RELATIVE = ("~", "./", "../")  # beginnings of relative paths


def model_card(about: About, name: str) -> str:
    """The text of the card, in Markdown with the front matter that the Hugging Face Hub reads.

    Args:
        about: description of the network.
        name: name of the exported folder.
    """
    kind = "student" if about.network == "student" else "merged dynamic teacher"
    channels, height, width = about.shape
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        "- timm",
        "- knowledge-distillation",
        "---",
        f"# {name}",
        "",
        f"The {kind} of a run of Gap Preserving Distillation (Guo et al., ICLR 2025, "
        "[arXiv 2410.04140](https://arxiv.org/abs/2410.04140)): an image classifier, "
        f"`{about.spec.name}`, of {len(about.classes)} classes, for images of "
        f"{channels} x {height} x {width}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in about.facts.items()),
        f"| versions | gpd {gpd_version()}, torch {torch.__version__}, timm {timm.__version__} |",
        "",
        f"Classes: {_listed(about.classes)}."
        + ("" if about.has_class_names else " The checkpoint does not contain their names."),
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        "import torch",
        "from PIL import Image",
        "",
        f'network = timm.create_model("local-dir:{name}", pretrained=True).eval()',
        "data = timm.data.resolve_model_data_config(network)",
        "prepare = timm.data.create_transform(**data)",
        f'image = Image.open("picture.png").convert("{"L" if channels == 1 else "RGB"}")',
        "with torch.no_grad():",
        "    probabilities = network(prepare(image)[None]).softmax(1)[0]",
        'print(network.pretrained_cfg["label_names"][int(probabilities.argmax())])',
        "```",
        "",
    ]
    if about.preprocessing is None:
        lines += [
            "The checkpoint does not say how images were prepared: `data` is the default of the "
            "architecture.",
            "",
        ]
    if about.settings:
        lines += [
            "## Settings of the run",
            "",
            f"The configuration for `gpd fit -c FILE`, without {about.left_out}:",
            "",
            "```yaml",
            about.settings.rstrip(),
            "```",
            "",
        ]
    return "\n".join(lines)


def facts_of_run(content: Mapping[str, Any], averaged: bool) -> dict[str, str]:
    """Facts for the card, by title, from a checkpoint of `fit`.

    Args:
        content: content of the checkpoint.
        averaged: whether the exported weights are the averaged ones, which validation scored; only
            then are the validation accuracies included.
    """
    facts: dict[str, str] = {}
    model = dict(content.get("hyper_parameters", {}))
    data = dict(content.get("datamodule_hyper_parameters", {}))
    if dataset := data.get("dataset"):
        facts["data"] = f"{dataset}, trained on `{data.get('train_split')}`"
    if optimizer := _mapping(model.get("optimizer")):
        recipe = f"{optimizer.get('opt')}, learning rate {optimizer.get('lr')}, "
        recipe += f"schedule {optimizer.get('sched')}"
        facts["recipe"] = f"{recipe}, {_position(content)}"
        facts["dynamic teacher"] = f"ratio {model.get('ratio')}, branches {model.get('branches')}"
    teacher, method = model.get("static_teacher"), model.get("method")
    # In checkpoints of earlier versions, teacher and method are plain names.
    if name := _mapping(teacher).get("name") or (teacher if isinstance(teacher, str) else None):
        loss = str(_mapping(method).get("class_path") or method).rpartition(".")[2]
        facts["static teacher"] = f"{name}, by {loss}"
    epochs = _mapping(_mapping(content.get("callbacks")).get("GapHistory")).get("epochs", {})
    scores = epochs.get(content.get("epoch"), {}) if averaged else {}
    for key, title in (
        ("val/student_top1", "validation accuracy, student"),
        ("val/teacher_top1", "validation accuracy, dynamic teacher"),
    ):
        if key in scores:
            facts[title] = f"{scores[key]:.2f} %"
    if "val/gap" in scores:
        facts["gap"] = f"{scores['val/gap']:.2f} points"
    return facts


def settings_of_run(content: Mapping[str, Any]) -> tuple[str, str]:
    """The settings of a run in YAML, as a configuration, and a text about what is left out.

    Args:
        content: content of a checkpoint of `fit`.
    """
    settings, left_out = _settings(content)
    return yaml.safe_dump(settings, sort_keys=False), left_out


def _position(content: Mapping[str, Any]) -> str:
    """The position of a checkpoint in its run, as text such as ``epoch 3 of 30``.

    The length of the run is missing in checkpoints of earlier versions.

    Args:
        content: content of the checkpoint.
    """
    steps = _count(content, "run_length", "max_steps")
    if steps is not None:
        return f"update {content['global_step']} of {steps}"
    # In a checkpoint written after the last hooks of an epoch, `epoch` is that of the next one.
    begun = _count(content, "loops", "fit_loop", "epoch_progress", "current", "ready")
    epochs = _count(content, "run_length", "max_epochs")
    of = "" if epochs is None else f" of {epochs}"
    return f"{_within(content)}epoch {begun or content['epoch'] + 1}{of}"


def _within(content: Mapping[str, Any]) -> str:
    """The text ``within `` for a checkpoint written within an epoch; empty for an epoch's end."""
    made = _count(content, "schedule", "updates_in_epoch")
    whole = _count(content, "schedule", "updates_per_epoch")
    batches = _count(content, "epoch_length", "batches")
    if whole is None and batches is not None:  # the run's length is given in updates
        whole = math.ceil(batches / (_count(content, "epoch_length", "accumulated") or 1))
    return "" if made is None or whole is None or made >= whole else "within "


def _count(content: Mapping[str, Any], *keys: str) -> int | None:
    """A number in a checkpoint, by its nested keys; None if it is missing or -1 (no limit)."""
    value: Any = content
    for key in keys:
        value = _mapping(value).get(key)
    return value if isinstance(value, int) and value >= 0 else None


def _settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings of the run in the form of a configuration, and a text about what is left out.

    Args:
        content: content of a checkpoint. Checkpoints of earlier versions, and of runs that were not
            started by the command line, lack the complete settings; then only the settings of model
            and data, and the length of the run, are included.
    """
    if known := _mapping(content.get("settings")):
        trainer = {k: v for k, v in _mapping(known.get("trainer")).items() if v is not None}
        return _public({**known, "trainer": trainer}), "loggers and the paths of files"
    settings = {"model": _public(_mapping(content.get("hyper_parameters")))}
    if data := _mapping(content.get("datamodule_hyper_parameters")):
        path = data.get("_class_path", "gpd_cli.data.ImageData")
        settings["data"] = {"class_path": path, "init_args": _public(data)}
    limits = {name: _count(content, "run_length", name) for name in ("max_epochs", "max_steps")}
    if trainer := {name: limit for name, limit in limits.items() if limit is not None}:
        settings["trainer"] = trainer
    return settings, (
        f"the paths of files, and without {'other' if trainer else 'the'} options of the trainer, "
        "callbacks and seed, which the checkpoint does not contain"
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without private entries and without paths of files."""
    return {
        key: _public(value) if isinstance(value, Mapping) else _plain(value)
        for key, value in values.items()
        if not str(key).startswith("_") and key not in _PRIVATE and not _is_path(value)
    }


def _is_path(value: Any) -> bool:
    """Whether a value is the path of a file or folder, or a list that contains one."""
    if isinstance(value, list | tuple):
        return any(_is_path(entry) for entry in value)
    if not isinstance(value, str):
        return False
    kinds = (PurePosixPath, PureWindowsPath)
    return value.startswith(_RELATIVE) or any(kind(value).is_absolute() for kind in kinds)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_public(v) if isinstance(v, Mapping) else _plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
