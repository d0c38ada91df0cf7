"""The stages of a network whose user names none, and what methods look for at a stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from gpd_cli.features.running import Run, Seen
from gpd_cli.features.stage import Layout, Stage

MOST_STAGES = 4
"""Stages looked at by default, the deepest ones."""

_SHALLOW = 1
"""Dots in the name of a module that may be a stage."""


def default_stages(
    network: nn.Module, outputs: Mapping[str, Seen], layout: Layout
) -> tuple[Stage, ...]:
    """The ends of a network's stages, from shallow to deep.

    Args:
        network: the network.
        outputs: what its modules gave, see `run`.
        layout: what it says about its features.
    """
    listed = [name for name in _listed(network) if name in outputs]
    stages = _known(listed, outputs, layout)
    by_resolution = _last_of_each_resolution(stages)
    if not stages:
        by_resolution = _unlisted(outputs, layout)
    if len(by_resolution) > 1:
        return tuple(by_resolution[-MOST_STAGES:])
    if len(stages) <= 1:
        stages = _known(_longest_run(network, outputs), outputs, layout) or by_resolution
    step = len(stages) / MOST_STAGES
    if step <= 1:
        return tuple(stages)
    return tuple(stages[math.ceil(step * (k + 1)) - 1] for k in range(MOST_STAGES))


def pooled_stage(seen: Run, layout: Layout, names: Iterable[str]) -> Stage | None:
    """The last of some modules whose map, averaged over its positions, is what the classifier sees.

    Args:
        seen: a run of the network.
        layout: what it says about its features.
        names: of the modules, in the order in which they ended.

    Returns:
        None if there is no such module.
    """
    for name in reversed(list(names)):
        given = seen.outputs[name]
        stage = layout.stage(name, given.shape)
        if stage is None or seen.embedding is None or stage.positions == 1 or given.overwritten:
            continue
        mean = stage.as_map(given.tensor).mean(dim=(2, 3))
        if mean.shape == seen.embedding.shape and torch.allclose(
            mean, seen.embedding, rtol=1e-3, atol=1e-4 * float(seen.embedding.abs().max())
        ):
            return stage
    return None


def before_activation(seen: Run, stage: Stage) -> Stage:
    """What the activation is given that a stage ends in; the stage itself if it ends in none.

    Args:
        seen: a run of the network.
        stage: of it.
    """
    for name in seen.inputs:
        if seen.outputs[name].same(seen.outputs[stage.name]):
            return replace(stage, name=name, before=True)
    return stage


def _listed(network: nn.Module) -> list[str]:
    """Modules in timm's ``feature_info``."""
    info = getattr(network, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    return [
        str(entry["module"]) for entry in entries if isinstance(entry, dict) and "module" in entry
    ]


def _known(names: Iterable[str], outputs: Mapping[str, Seen], layout: Layout) -> list[Stage]:
    stages = (layout.stage(name, outputs[name].shape) for name in names)
    return [stage for stage in stages if stage is not None]


def _unlisted(outputs: Mapping[str, Seen], layout: Layout) -> list[Stage]:
    """The last modules at each resolution, no deeper inside others than it takes to find two."""
    found: list[Stage] = []
    for dots in range(_SHALLOW, 1 + max((name.count(".") for name in outputs), default=0)):
        # Further inside, layers that mix tokens give tensors that look like maps.
        names = (
            name
            for name, seen in outputs.items()
            if name.count(".") <= dots and (dots == _SHALLOW or seen.tensor.ndim == 4)
        )
        # A single position is what pooling gives, not a stage.
        stages = [stage for stage in _known(names, outputs, layout) if stage.positions > 1]
        deeper = _last_of_each_resolution(stages)
        found = found or deeper
        if len(deeper) > 1:
            return deeper
    return found


def _last_of_each_resolution(stages: Iterable[Stage]) -> list[Stage]:
    """Of stages in the order in which they ended; resolutions only fall on the way."""
    kept: list[Stage] = []
    for stage in stages:
        if kept and stage.positions > kept[-1].positions:
            continue
        if kept and stage.positions == kept[-1].positions:
            kept.pop()
        kept.append(stage)
    return kept


def _longest_run(network: nn.Module, outputs: Mapping[str, Seen]) -> list[str]:
    """The blocks of the container with the most of one output shape."""
    best: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            prefix = f"{name}." if name else ""
            blocks = [prefix + key for key, _ in module.named_children() if prefix + key in outputs]
            if len({outputs[block].shape for block in blocks}) == 1 and len(blocks) > len(best):
                best = blocks
    return best
