"""The container that decides each layer's layout, and the layers that need one layout."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from gpd_cli.widening.layout import Scale
from gpd_cli.widening.names import split_name
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.recording import Recording


def splits_by_container(recording: Recording, scale: Scale) -> dict[str, dict[str, list[Split]]]:
    """The splits of layers' outputs, by the container that decides the layers' layout.

    Args:
        recording: the student's run.
        scale: how much wider the network gets.

    Returns:
        Per container, per layer, the splits of the layer's outputs. The container is the innermost
        one around both the layer and the code that takes its outputs apart.
    """
    found: dict[str, dict[str, list[Split]]] = {}
    for layers, splits in _layers_of_one_layout(recording, scale):
        parents = [split_name(layer)[0] for layer in layers]
        if len(layers) == 1:
            for container, split in splits:
                common = _common(container, parents[0])
                # Names of heads in another module mean nothing to the containers in between.
                known = split if common == container else replace(split, names=())
                found.setdefault(common, {}).setdefault(layers[0], []).append(known)
            continue
        common = reduce(_common, [*parents, *(container for container, _ in splits)])
        for layer in layers:
            found.setdefault(common, {})[layer] = list(dict.fromkeys(s for _, s in splits))
    return found


def _layers_of_one_layout(
    recording: Recording, scale: Scale
) -> list[tuple[list[str], list[tuple[str, Split]]]]:
    """Groups of layers that need one layout, with all splits of their outputs.

    Layers whose outputs are added need one layout, unless all channels have equally many copies:
    copies side by side then coincide anyway.
    """
    groups = [{layer} for layer in recording.splits]
    if scale.rounded_to > 1 or not float(scale.ratio).is_integer():
        for layers in recording.sums:
            apart = [group for group in groups if not group & layers]
            groups = [*apart, layers.union(*(group for group in groups if group & layers))]
    joined = []
    for group in groups:
        # In the order of the run: the order of a set differs from process to process.
        ordered = [layer for layer in recording.out_channels if layer in group]
        splits = [s for layer in ordered for s in recording.splits.get(layer, ())]
        if splits:
            joined.append((ordered, list(dict.fromkeys(splits))))
    return joined


def _common(a: str, b: str) -> str:
    """The innermost module that contains two modules, by name."""
    parts = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)
