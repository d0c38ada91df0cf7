"""Where a network's stages end and what its classifier is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpd_cli.errors import MethodError

MOST_STAGES = 4
"""Stages looked at by default, the deepest ones."""

Form = Literal["map", "map_last", "tokens"]
"""How a stage lays out its output: ``[B, C, H, W]``, ``[B, H, W, C]`` or ``[B, N, C]``."""


@dataclass(frozen=True)
class Stage:
    """The end of a stage.

    Args:
        name: of the module whose output it is.
        form: its layout.
        channels: C, in the network that was looked at.
        height: of the map, in positions.
        width: of the map, in positions.
    """

    name: str
    form: Form
    channels: int
    height: int
    width: int

    def as_map(self, output: Tensor) -> Tensor:
        """An output of the stage as a map, ``[B, C, H, W]``; class tokens are left out."""
        if self.form == "map":
            return output
        if self.form == "map_last":
            return output.permute(0, 3, 1, 2)
        patches = self.height * self.width
        rows = output[:, output.shape[1] - patches :]
        return rows.transpose(1, 2).unflatten(2, (self.height, self.width))


@dataclass(frozen=True)
class Places:
    """Where to look in a network.

    Args:
        stages: from shallow to deep.
        classifier: name of the linear layer that gives the logits, or None.
        embedding: its number of inputs, F; 0 without one.
    """

    stages: tuple[Stage, ...] = ()
    classifier: str | None = None
    embedding: int = 0


def find_places(
    network: nn.Module,
    shape: tuple[int, int, int],
    *,
    names: Sequence[str] | None = None,
    like: Places | None = None,
) -> Places:
    """Find the stages and the classifier of a network by running it on two black images.

    By default the stages are those timm lists in ``feature_info``; in other networks the last
    module at each resolution; in both the deepest `MOST_STAGES`. Where all have one resolution
    (most transformers) they are blocks at even distances.

    Args:
        network: a classifier; left as it was.
        shape: of its images, ``(C, H, W)``.
        names: modules whose outputs are the stages, from shallow to deep.
        like: places of a narrow network, to look at the same ones in its dynamic teacher.

    Raises:
        MethodError: when there is no such module, or its output is neither map nor tokens.
    """
    if like is not None:
        names = [stage.name for stage in like.stages]
    modules = dict(network.named_modules())
    for name in names or ():
        if name not in modules:
            raise MethodError(
                f"{type(network).__name__} has no module '{name}' to take features from; its "
                f"first are {', '.join(n for n, _ in network.named_children())}."
            )
    outputs, classifier = _run(network, shape)
    if like is not None:
        found = [_stage(s.name, outputs[s.name], s.form) for s in like.stages]
        stages = tuple(stage for stage in found if stage is not None)
    elif names is not None:
        stages = tuple(_named_stage(network, name, outputs.get(name)) for name in names)
    else:
        stages = _default_stages(network, outputs)
    if classifier is None:
        return Places(stages)
    linear = modules[classifier]
    assert isinstance(linear, nn.Linear)
    return Places(stages, classifier, linear.in_features)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a module's output."""
    while isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise MethodError(f"A module gives a {type(output).__name__} where features were expected.")
    return output


def _run(
    network: nn.Module, shape: tuple[int, int, int]
) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """The shape of every module's output, in the order they ended; and the last linear layer."""
    outputs: dict[str, tuple[int, ...]] = {}
    linear: list[str] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            while isinstance(output, tuple | list) and output:
                output = output[0]
            if isinstance(output, Tensor):
                outputs.pop(name, None)
                outputs[name] = tuple(output.shape)
            if isinstance(module, nn.Linear) and args and args[0].ndim == 2:
                linear.append(name)

        return note

    handles = [
        module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name
    ]
    modes = [(module, module.training) for module in network.modules()]
    like = next(network.parameters())
    try:
        with torch.no_grad():
            images = torch.zeros(2, *shape, device=like.device, dtype=like.dtype)
            logits = first_tensor(network.eval()(images))
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    last = linear[-1] if linear and outputs[linear[-1]] == tuple(logits.shape) else None
    return outputs, last


def _default_stages(network: nn.Module, outputs: dict[str, tuple[int, ...]]) -> tuple[Stage, ...]:
    listed = [name for name in _listed(network) if name in outputs]
    stages = _known(listed, outputs, network) if listed else []
    if not stages:
        shallow = (name for name in outputs if name.count(".") <= 1)
        stages = _known(shallow, outputs, network)
    resolutions = {(s.height, s.width): s for s in stages}  # the last of each
    if len(resolutions) > 1:
        return tuple(resolutions.values())[-MOST_STAGES:]
    if len(stages) <= 1 or not listed:
        stages = _known(_longest_run(network, outputs), outputs, network) or stages
    step = len(stages) / MOST_STAGES
    if step <= 1:
        return tuple(stages)
    return tuple(stages[math.ceil(step * (k + 1)) - 1] for k in range(MOST_STAGES))


def _listed(network: nn.Module) -> list[str]:
    """Modules in timm's ``feature_info``."""
    info = getattr(network, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    return [
        str(entry["module"]) for entry in entries if isinstance(entry, dict) and "module" in entry
    ]


def _known(
    names: Iterable[str], outputs: dict[str, tuple[int, ...]], network: nn.Module
) -> list[Stage]:
    form = _form(network)
    stages = (_stage(name, outputs[name], form) for name in names)
    return [s for s in stages if s is not None and s.height * s.width > 1]


def _form(network: nn.Module) -> Form | None:
    """What timm says about the layout of a network's feature maps, if it says that."""
    return "map_last" if getattr(network, "output_fmt", None) == "NHWC" else None


def _longest_run(network: nn.Module, outputs: dict[str, tuple[int, ...]]) -> list[str]:
    """The blocks of the container with the most of one output shape."""
    best: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            prefix = f"{name}." if name else ""
            blocks = [prefix + key for key, _ in module.named_children() if prefix + key in outputs]
            if len({outputs[block] for block in blocks}) == 1 and len(blocks) > len(best):
                best = blocks
    return best


def _named_stage(network: nn.Module, name: str, shape: tuple[int, ...] | None) -> Stage:
    form = _form(network)
    stage = None if shape is None else _stage(name, shape, form)
    if stage is None:
        got = "nothing" if shape is None else f"a tensor of shape {list(shape)}"
        raise MethodError(
            f"Module '{name}' of {type(network).__name__} gives {got}, and features have to be a "
            "map [B, C, H, W] or tokens [B, N, C]; name another module."
        )
    return stage


def _stage(name: str, shape: tuple[int, ...], form: Form | None) -> Stage | None:
    """What an output of this shape is; None if it is no feature map."""
    if len(shape) == 4:
        # Maps are square here, nearly always; channels are the axis that is not.
        last = shape[1] == shape[2] != shape[3]
        if (form or ("map_last" if last else "map")) == "map_last":
            return Stage(name, "map_last", shape[3], shape[1], shape[2])
        return Stage(name, "map", shape[1], shape[2], shape[3])
    if len(shape) == 3:
        side = math.isqrt(shape[1])
        return Stage(name, "tokens", shape[2], side, side)
    return None
