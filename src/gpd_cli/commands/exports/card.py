"""The model card: what a person who did not train a network has to know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import yaml

from gpd_cli.commands.exports.about import About, gpd_version

_SHOWN = 20  # class names
_PRIVATE = ("root", "student_weights", "weights")  # paths of the machine that trained it


def model_card(about: About, name: str) -> str:
    """Write the card as Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        about: what the network is.
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
        *(f"| {key} | {value} |" for key, value in about.facts.items() if key != "settings"),
        f"| versions | gpd {gpd_version()}, torch {torch.__version__}, timm {timm.__version__} |",
        "",
        f"Classes: {_listed(about.classes)}."
        + ("" if about.has_class_names else " The checkpoint does not know their names."),
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
            "The checkpoint does not know how its images were prepared: what `data` says is the "
            "architecture's default.",
            "",
        ]
    if "settings" in about.facts:
        lines += [
            "## Settings of the run",
            "",
            "As `gpd fit -c FILE` takes them, without the paths of files:",
            "",
            "```yaml",
            about.facts["settings"].rstrip(),
            "```",
            "",
        ]
    return "\n".join(lines)


def facts_of_run(content: Mapping[str, Any], averaged: bool) -> dict[str, str]:
    """Lines of the card that a checkpoint of `fit` knows.

    Args:
        content: content of the checkpoint.
        averaged: whether the exported weights are those that validation scored.
    """
    facts: dict[str, str] = {}
    model = dict(content.get("hyper_parameters", {}))
    data = dict(content.get("datamodule_hyper_parameters", {}))
    schedule = content.get("schedule") or {}
    if dataset := data.get("dataset"):
        facts["data"] = f"{dataset}, trained on `{data.get('train_split')}`"
    per_epoch = schedule.get("updates_per_epoch")
    length = round(schedule["updates"] / per_epoch) if per_epoch else None
    if optimizer := _mapping(model.get("optimizer")):
        recipe = f"{optimizer.get('opt')}, learning rate {optimizer.get('lr')}, "
        recipe += f"schedule {optimizer.get('sched')}"
        if length is not None:
            recipe += f", epoch {content['epoch'] + 1} of {length}"
        facts["recipe"] = recipe
        facts["dynamic teacher"] = f"ratio {model.get('ratio')}, branches {model.get('branches')}"
    teacher, method = model.get("static_teacher"), model.get("method")
    # Older checkpoints have both by their names.
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
    settings: dict[str, Any] = {"model": _public(model)}
    if data:
        settings["data"] = {
            "class_path": data.get("_class_path", "gpd_cli.data.ImageData"),
            "init_args": _public(data),
        }
    if length is not None:
        settings["trainer"] = {"max_epochs": length}
    facts["settings"] = yaml.safe_dump(settings, sort_keys=False)
    return facts


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that only the machine which trained has a use for."""
    return {
        key: _public(value) if isinstance(value, Mapping) else _plain(value)
        for key, value in values.items()
        if not str(key).startswith("_") and key not in _PRIVATE
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_public(v) if isinstance(v, Mapping) else _plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
