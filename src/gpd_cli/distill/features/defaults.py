"""Choose the default stages of a network, for users who name none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from gpd_cli.distill.features.running import Recorded
from gpd_cli.distill.features.stage import ShapeHints, Stage

MOST_STAGES = 4
"""Largest number of default stages; of more stages the deepest are taken."""

_SHALLOW = 1
"""Largest number of dots in the names of those modules that are tried as stages first."""


def default_stages(
    network: nn.Module, outputs: Mapping[str, Recorded], hints: ShapeHints
) -> tuple[Stage, ...]:
    """Choose the default stages of a network, from shallow to deep.

    Args:
        network: the network.
        outputs: the outputs of the network's modules by module name, from `run`.
        hints: what the network says about the shapes of its features.
    """
    listed = [name for name in _listed(network) if name in outputs]
    stages = known_stages(listed, outputs, hints)
    by_resolution = _last_of_each_resolution(stages)
    if not stages:
        by_resolution = _unlisted(outputs, hints)
    if len(by_resolution) > 1:
        return tuple(by_resolution[-MOST_STAGES:])
    if len(stages) <= 1:
        stages = known_stages(_longest_run(network, outputs), outputs, hints) or by_resolution
    step = len(stages) / MOST_STAGES
    if step <= 1:
        return tuple(stages)
    return tuple(stages[math.ceil(step * (k + 1)) - 1] for k in range(MOST_STAGES))


def known_stages(
    names: Iterable[str], outputs: Mapping[str, Recorded], hints: ShapeHints
) -> list[Stage]:
    """Make a stage of each module whose output is a map or tokens, in the order given.

    Args:
        names: names of modules.
        outputs: the outputs of modules by module name, from `run`.
        hints: what the network says about the shapes of its features.
    """
    stages = (hints.stage(name, outputs[name].shape) for name in names)
    return [stage for stage in stages if stage is not None]


def _listed(network: nn.Module) -> list[str]:
    """Names of the modules that are listed in a timm network's ``feature_info``."""
    info = getattr(network, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    return [
        str(entry["module"]) for entry in entries if isinstance(entry, dict) and "module" in entry
    ]


def _unlisted(outputs: Mapping[str, Recorded], hints: ShapeHints) -> list[Stage]:
    """The last stage at each resolution, for networks without ``feature_info``.

    Only shallow modules are tried at first, and then deeper ones, level by level, until the stages
    have two resolutions or more.
    """
    found: list[Stage] = []
    deepest = max([_SHALLOW, *(name.count(".") for name in outputs)])
    for dots in range(_SHALLOW, 1 + deepest):
        # Of deeper modules only four-dimensional outputs are taken: other outputs there, of layers
        # that mix tokens, may be mistaken for tokens.
        names = (
            name
            for name, seen in outputs.items()
            if name.count(".") <= dots and (dots == _SHALLOW or seen.tensor.ndim == 4)
        )
        # A map of a single position is the result of pooling, and no stage.
        stages = [stage for stage in known_stages(names, outputs, hints) if stage.positions > 1]
        deeper = _last_of_each_resolution(stages)
        found = found or deeper
        if len(deeper) > 1:
            return deeper
    return found


def _last_of_each_resolution(stages: Iterable[Stage]) -> list[Stage]:
    """The last stage at each resolution; stages with more positions than the last are skipped."""
    kept: list[Stage] = []
    for stage in stages:
        if kept and stage.positions > kept[-1].positions:
            continue
        if kept and stage.positions == kept[-1].positions:
            kept.pop()
        kept.append(stage)
    return kept


def _longest_run(network: nn.Module, outputs: Mapping[str, Recorded]) -> list[str]:
    """Names of the modules in the longest sequential container whose outputs have all one shape."""
    best: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            prefix = f"{name}." if name else ""
            blocks = [prefix + key for key, _ in module.named_children() if prefix + key in outputs]
            if len({outputs[block].shape for block in blocks}) == 1 and len(blocks) > len(best):
                best = blocks
    return best
