"""Extraction of the student from checkpoints of the paper authors' code (guoyongcs/GPD).

The content of such checkpoints, found by reading the authors' code:

- The file has timm's layout: ``state_dict`` and, if the run had an average, ``state_dict_ema``.
  With ReviewKD, the names of the network's tensors begin with ``student.``.
- Every tensor belongs to the dynamic teacher, whose channels are whole copies of the student's, one
  after another; the student's part is the first copy. Kernels and biases of convolutions and linear
  layers are stored divided by the ratio, except for depthwise convolutions and the classifier.
  Norms are stored undivided, with the student's own running statistics beside the teacher's
  (``tiny_running_mean``, ``tiny_running_var``).
- A layer with branches has six of them, whose gates are the rows of ``vector``. The student's
  kernel is merged from slices of the branches' tensors. Such a layer has a bias even if the layer
  of the student has none.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor, nn

from gpd_cli.branches.functional import (
    depthwise_separable,
    frequency_prior,
    pointwise_average,
    pointwise_kxk,
)
from gpd_cli.data import ImageSpec
from gpd_cli.errors import WeightsError
from gpd_cli.files import check_whole
from gpd_cli.models import ModelSpec
from gpd_cli.teacher.checkpoint import Weights
from gpd_cli.teacher.checkpoint_checks import damaged
from gpd_cli.teacher.description import Description
from gpd_cli.teacher.networks import Alone

Rename = Callable[[nn.Module], dict[str, str]]

_MARK = ".tiny_running_mean"
_AVERAGED, _RAW = "state_dict_ema", "state_dict"
_PREFIXES = ("module.", "student.")
_MAIN = "weight_orepa_origin"
_MULTIPLIER = 8  # outputs per input channel in the authors' depthwise-separable branch
_SIDE = 224  # height and width of the images that the authors train on


def read_authors(path: Path, weights: Weights = "ema") -> tuple[Alone, Description, str] | None:
    """Read the student from a checkpoint of the authors' code.

    Args:
        path: path of the file.
        weights: ``ema`` for the averaged weights, if the file has any; ``raw`` for the trained
            weights.

    Returns:
        The student, its description, and a text that says which weights were taken. None if the
        file is not a checkpoint of the authors' code.

    Raises:
        WeightsError: when the file is damaged, or its network is not one of `_STUDENTS`.
    """
    content = _content(path)
    if content is None:
        return None
    check_whole(path)
    has_average = weights == "ema" and isinstance(content.get(_AVERAGED), Mapping)
    key = _AVERAGED if has_average else _RAW
    stored = _unwrapped(content[key])
    for name, rename in _STUDENTS.items():
        spec = ModelSpec(name, _classes(stored))
        with torch.device("meta"):
            names = rename(outline := spec.build())
        if not _covers(outline, names, stored):
            continue
        student = spec.build()
        try:
            state, ratio, merged = _student_state(student, names, stored)
            student.load_state_dict(state)
        except Exception as error:  # a layer in the file lacks a tensor, or has another size
            raise damaged(path, error) from error
        known = ImageNetInfo().label_names()
        images = ImageSpec(
            class_names=tuple(known) if len(known) == spec.num_classes else None,
            size=(_SIDE, _SIDE),
            channels=3,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            crop_pct=0.875,
            interpolation="bicubic" if name.startswith("rvt") else "bilinear",
            dataset="ImageNet",
        )
        taken = "averaged" if key == _AVERAGED else "raw"
        return (
            Alone(student.eval()),
            Description(spec, None, (3, _SIDE, _SIDE), images=images),
            f"{taken}, of the paper's authors' code: ratio {ratio}, branches of {merged} kernels "
            "merged",
        )
    raise WeightsError(
        f"{path} is a checkpoint of the paper's authors' code for a network other than "
        f"{', '.join(_STUDENTS)}; extract the student with the authors' code."
    )


def _content(path: Path) -> Mapping[str, Any] | None:
    """The content of a file if it is a checkpoint of the authors' code; otherwise None."""
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch raises many types; whoever reads the file next reports the error
        return None
    state = content.get(_RAW) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(str(key).endswith(_MARK) for key in state):
        return None
    return cast(Mapping[str, Any], content)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors, with prefixes of wrapping modules removed from their names."""
    found = {str(key): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in found if key.endswith(_MARK)):
            found = {k[len(prefix) :]: v for k, v in found.items() if k.startswith(prefix)}
    return found


def _classes(stored: Mapping[str, Tensor]) -> int:
    names = ("fc.weight", "head.weight")
    found = (stored[name].shape for name in names if name in stored)
    return next((shape[0] for shape in found if shape), 1000)


def _same_names(student: nn.Module) -> dict[str, str]:
    """The authors' module names by ours, for networks in which both are the same."""
    return {name: name for name, _ in student.named_modules()}


def _mobilenet_names(student: nn.Module) -> dict[str, str]:
    """The authors' module names of MobileNet V1 by ours, which are those of timm."""
    names = {"conv_stem": "model.0.0", "bn1": "model.0.1", "classifier": "fc"}
    blocks = [
        f"blocks.{stage}.{number}"
        for stage, part in enumerate(student.get_submodule("blocks").children())
        for number, _ in enumerate(part.children())
    ]
    for place, block in enumerate(blocks, start=1):
        for number, leaf in ((0, "conv_dw"), (1, "bn1"), (3, "conv_pw"), (4, "bn2")):
            names[f"{block}.{leaf}"] = f"model.{place}.{number}"
    return names


_STUDENTS: dict[str, Rename] = {
    "resnet18": _same_names,
    "resnet34": _same_names,
    "resnet50": _same_names,
    "mobilenetv1_relu": _mobilenet_names,
    "rvt_tiny": _same_names,
    "rvt_small": _same_names,
}


def _layers(student: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield names and modules that have parameters or buffers of their own."""
    for name, module in student.named_modules():
        if module._parameters or module._buffers:
            yield name, module


def _covers(student: nn.Module, names: Mapping[str, str], stored: Mapping[str, Tensor]) -> bool:
    """Whether a file has exactly the layers of an architecture.

    Args:
        student: the architecture.
        names: the authors' module names by ours.
        stored: tensors of the file by name.
    """
    ours = {names.get(name, name) for name, _ in _layers(student)}
    theirs = {key.rpartition(".")[0] for key in stored}
    return ours == theirs


def _student_state(
    student: nn.Module, names: Mapping[str, str], stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int, int]:
    """Compute the student's state dict from the tensors of the dynamic teacher.

    Args:
        student: the student, which is not changed.
        names: the authors' module names by ours.
        stored: tensors of the file by name.

    Returns:
        The student's state dict, the expansion ratio, and the number of kernels with branches.
    """
    state, merged, shift = dict(student.state_dict()), 0, None
    ratio = max(
        stored[f"{names[name]}.weight"].shape[0] // module.num_features
        for name, module in _layers(student)
        if isinstance(module, nn.BatchNorm2d)
    )
    for name, module in _layers(student):
        own = {
            key.rpartition(".")[2]: value
            for key, value in stored.items()
            if key.rpartition(".")[0] == names[name]
        }
        if isinstance(module, nn.Conv2d | nn.Linear):
            grouped = getattr(module, "groups", 1) > 1
            kernel = own.get(_MAIN, own.get("weight"))
            assert kernel is not None
            wide = kernel.shape[0] > module.weight.shape[0]
            scale = ratio if wide and not grouped else 1
            if _MAIN in own:
                assert isinstance(module, nn.Conv2d)
                weight, merged = _merged(module, own, scale), merged + 1
            else:
                weight = _cut(kernel, module.weight.shape).double() * scale
            state[f"{name}.weight"] = weight
            bias = own.get("bias", own.get("bias_orepa_origin"))
            bias = None if bias is None else bias[: len(weight)].double() * scale
            if module.bias is not None and bias is not None:
                state[f"{name}.bias"] = bias
            elif bias is not None:
                shift = bias  # the student has no such bias; the next norm's mean absorbs it
        elif isinstance(module, nn.BatchNorm2d):
            for key in ("weight", "bias"):
                state[f"{name}.{key}"] = own[key][: module.num_features]
            # The authors' code copies the student's statistics from the teacher's at the first run.
            fresh = float(own["tiny_running_mean"].mean()) == 0
            for key in ("running_mean", "running_var"):
                source = own[key if fresh else f"tiny_{key}"]
                state[f"{name}.{key}"] = source[: module.num_features].double()
            if shift is not None:
                state[f"{name}.running_mean"] = state[f"{name}.running_mean"] - shift
                shift = None
            state[f"{name}.num_batches_tracked"] = own["num_batches_tracked"]
        else:
            for key in module.state_dict():
                state[f"{name}.{key}"] = _cut(own[key], state[f"{name}.{key}"].shape)
    return state, ratio, merged


def _cut(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)]


def _merged(conv: nn.Conv2d, own: Mapping[str, Tensor], scale: int) -> Tensor:
    """The student's kernel of a layer with branches, in float64.

    Args:
        conv: the student's layer.
        own: tensors of the same layer in the authors' checkpoint, by name.
        scale: the factor by which dense kernels have been divided in the checkpoint.
    """
    outputs, fan, *size = conv.weight.shape
    inputs, groups = conv.in_channels, conv.groups

    def dense(key: str) -> Tensor:
        return own[f"weight_orepa_{key}"][:outputs, :fan].double() * scale

    gates = own["vector"][:, :outputs].double()
    first = own["weight_orepa_1x1_kxk_idconv1"] + own["id_tensor"]
    # The wide layer's sums over its inputs are as many times as large as its inputs are more.
    first = first[:inputs, :fan].double() * (first.shape[1] // fan)
    depthwise = own["weight_orepa_gconv_dw"][: inputs * _MULTIPLIER].double()
    pointwise = own["weight_orepa_gconv_pw"][:outputs, : fan * _MULTIPLIER].double() * scale
    branches = (
        dense("origin"),
        pointwise_average(dense("avg_conv"), size),
        frequency_prior(dense("pfir_conv"), own["weight_orepa_prior"][:outputs].double()),
        pointwise_kxk(first, dense("1x1_kxk_conv2"), groups),
        dense("1x1"),
        depthwise_separable(depthwise.view(inputs, _MULTIPLIER, *size), pointwise, groups),
    )
    weighted = [
        gate.view(-1, 1, 1, 1) * branch for gate, branch in zip(gates, branches, strict=True)
    ]
    return torch.stack(weighted).sum(0)
