"""The stages of a network whose user names none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from gpd_cli.distill.features.running import Seen
from gpd_cli.distill.features.stage import Layout, Stage

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
    stages = known_stages(listed, outputs, layout)
    by_resolution = _last_of_each_resolution(stages)
    if not stages:
        by_resolution = _unlisted(outputs, layout)
    if len(by_resolution) > 1:
        return tuple(by_resolution[-MOST_STAGES:])
    if len(stages) <= 1:
        stages = known_stages(_longest_run(network, outputs), outputs, layout) or by_resolution
    step = len(stages) / MOST_STAGES
    if step <= 1:
        return tuple(stages)
    return tuple(stages[math.ceil(step * (k + 1)) - 1] for k in range(MOST_STAGES))


def known_stages(names: Iterable[str], outputs: Mapping[str, Seen], layout: Layout) -> list[Stage]:
    """Those of some modules whose outputs are maps or tokens, in the order given.

    Args:
        names: of the modules.
        outputs: what modules gave, see `run`.
        layout: what the network says about its features.
    """
    stages = (layout.stage(name, outputs[name].shape) for name in names)
    return [stage for stage in stages if stage is not None]


def _listed(network: nn.Module) -> list[str]:
    """Modules in timm's ``feature_info``."""
    info = getattr(network, "feature_info", None)
    entries = getattr(info, "info", info)
    if not isinstance(entries, list | tuple):
        return []
    return [
        str(entry["module"]) for entry in entries if isinstance(entry, dict) and "module" in entry
    ]


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
        stages = [stage for stage in known_stages(names, outputs, layout) if stage.positions > 1]
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
