"""Export to a folder that timm can load, with weights, configuration and model card.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the network from the folder, and
``timm.data.resolve_model_data_config`` returns the network's preprocessing. The folder can also be
uploaded to the Hugging Face Hub as a model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from gpd_cli.commands.exports.about import About
from gpd_cli.commands.exports.card import model_card
from gpd_cli.errors import GpdError, reason_of
from gpd_cli.files import atomic_folder, json_text, save_tensors
from gpd_cli.package_version import gpd_version
from gpd_cli.teacher.compare import relative_difference

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_OF_GPD = "gpd"  # the entry of the configuration that says who wrote it
FILES = (WEIGHTS, CONFIG, CARD)
_OF_TORCHVISION = "torchvision/"
# Networks of this package that timm builds under another name, with these arguments.
_AS_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenetv1_relu": ("mobilenetv1_100", {"act_layer": "relu"})
}
# Parameters of timm's factory `create_model`, which it does not pass on to the constructors.
_OF_FACTORY = frozenset(inspect.signature(timm.create_model).parameters)
_ROUNDING, _HALF_ROUNDING = 1e-5, 3e-2  # tolerated relative differences in float32 and float16


def write_folder(
    network: nn.Module, state: Mapping[str, Tensor], output: Path, about: About, half: bool
) -> None:
    """Write a network as a folder, and test the folder with timm before it is kept.

    Args:
        network: the network, in eval mode.
        state: the network's state dict, with weights in half precision if `half` is set.
        output: path of the folder.
        about: description of the network.
        half: whether the weights are in half precision.

    Raises:
        GpdError: when timm has no such network, or the network that timm loads from the folder
            computes something else.
    """
    architecture, arguments = _as_timm(about)
    try:
        reference = timm.create_model(architecture, num_classes=about.spec.num_classes, **arguments)
    except Exception as error:  # constructors raise exceptions of any type
        raise _unknown(about) from error
    if {k: v.shape for k, v in reference.state_dict().items()} != {
        k: v.shape for k, v in state.items()
    }:
        raise _unknown(about)
    config = _config(reference, architecture, arguments, about)
    with atomic_folder(output, FILES) as folder:
        save_tensors(folder / WEIGHTS, state, about.strings())
        text = json_text(config, indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        card = model_card(about, output.resolve().name)
        (folder / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
        loaded = _loaded(folder, architecture)
        images = torch.randn(2, *about.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            difference = relative_difference(loaded(images), network(images))
        if not difference <= (_HALF_ROUNDING if half else _ROUNDING):
            raise GpdError(
                f"timm's {architecture} computes other logits with these weights (relative "
                f"difference {difference:.1e}), so the folder was not kept; write a .pt2 or .onnx "
                "file instead."
            )


def check_replaceable(path: Path) -> None:
    """Check that an existing folder is empty or an earlier export.

    Args:
        path: path of the folder, which need not exist.

    Raises:
        GpdError: when the folder has files, and its configuration is not one of gpd's.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or _OF_GPD not in config:
        raise GpdError(
            f"Cannot write the folder '{path}': gpd did not write the files that it contains; "
            "choose a new folder."
        )


def _as_timm(about: About) -> tuple[str, dict[str, Any]]:
    """The name and the arguments with which timm builds the network without gpd."""
    if about.building_arguments is None:
        raise GpdError(
            f"No arguments of {about.spec.name} build its wide teacher, so it cannot be written as "
            "a folder; write a .pt2 or .onnx file instead, which need no source code."
        )
    name = about.spec.name.removeprefix(_OF_TORCHVISION)
    name, more = _AS_TIMM.get(name, (name, {}))
    if not timm.is_model(name) or not model_entrypoint(name).__module__.startswith("timm."):
        raise _unknown(about)
    return name, {**more, **about.building_arguments}


def _loaded(folder: Path, architecture: str) -> nn.Module:
    """The network that timm loads from a folder, in eval mode."""
    try:
        network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # constructors raise exceptions of any type
        reason = reason_of(error)
        raise GpdError(
            f"timm cannot load {architecture} from the files of the folder ({reason}), so the "
            "folder was not kept; write a .pt2 or .onnx file instead."
        ) from error
    return network.eval()


def _unknown(about: About) -> GpdError:
    return GpdError(
        f"timm alone cannot build {about.spec.name}, so it cannot be written as a folder; write a "
        ".pt2 or .onnx file, which need no source code, or a .safetensors file of its weights."
    )


def _config(
    reference: nn.Module, architecture: str, arguments: Mapping[str, Any], about: About
) -> dict[str, Any]:
    """The content of ``config.json``, which timm reads; entries under ``gpd`` are for people."""
    known = dict(reference.pretrained_cfg)  # type: ignore[arg-type]
    input_size = list(about.shape)
    first = known.get("first_conv") if about.shape[0] == 3 else None
    pretrained = {
        "num_classes": about.spec.num_classes,
        "input_size": input_size,
        "fixed_input_size": bool(known.get("fixed_input_size")),
        **(about.preprocessing or _timm_preprocessing(known, about.shape[0])),
        "first_conv": first,
        "classifier": known.get("classifier"),
        "custom_load": False,
    }
    return {
        "architecture": architecture,
        "num_classes": about.spec.num_classes,
        "num_features": getattr(reference, "num_features", None),
        "model_args": {k: v for k, v in arguments.items() if k not in _OF_FACTORY},
        "label_names": about.classes,
        "pretrained_cfg": {key: value for key, value in pretrained.items() if value is not None},
        _OF_GPD: {"network": about.network, "writer": f"gpd {gpd_version()}"},
    }


def _timm_preprocessing(known: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """The default preprocessing of timm for an architecture, for checkpoints without their own.

    Args:
        known: the ``pretrained_cfg`` of timm for the architecture.
        channels: number of image channels.
    """
    chosen = {key: known.get(key) for key in ("interpolation", "crop_pct", "crop_mode")}
    for key in ("mean", "std"):
        values = list(known.get(key) or ())
        chosen[key] = values if len(values) == channels else [0.5] * channels
    return chosen
