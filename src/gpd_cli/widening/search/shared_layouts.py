"""Find out in which container each layer's layout is decided, and which layers need the same."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from gpd_cli.widening.layout import Scale
from gpd_cli.widening.names import split_name
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.recording import Recording


def splits_by_container(recording: Recording, scale: Scale) -> dict[str, dict[str, list[Split]]]:
    """Collect the splits of layers' outputs by the container in which the layout is decided.

    This is the innermost container around both the layer and the code that takes the layer's
    outputs apart.

    Args:
        recording: the student's run.
        scale: how much wider the network gets.

    Returns:
        The splits of the layers' outputs, by name of the container and name of the layer.
    """
    found: dict[str, dict[str, list[Split]]] = {}
    for layers, splits in _layers_of_one_layout(recording, scale):
        parents = [split_name(layer)[0] for layer in layers]
        if len(layers) == 1:
            for container, split in splits:
                common = _common(container, parents[0])
                # Names of heads in another module say nothing about the attributes of this one.
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
    """Group the layers that need the same layout, with all splits of their outputs.

    Layers whose outputs are added need the same layout. If all channels have equally many copies,
    such layers need not be grouped.

    Args:
        recording: the student's run.
        scale: how much wider the network gets.

    Returns:
        For each group the names of its layers, and the splits of their outputs, each with the name
        of the container whose code takes the outputs apart.
    """
    groups = [{layer} for layer in recording.splits]
    if scale.rounded_to > 1 or not float(scale.ratio).is_integer():
        for layers in recording.sums:
            apart = [group for group in groups if not group & layers]
            groups = [*apart, layers.union(*(group for group in groups if group & layers))]
    joined = []
    for group in groups:
        # In the order of the run, since the order of a set differs between processes.
        ordered = [layer for layer in recording.out_channels if layer in group]
        splits = [s for layer in ordered for s in recording.splits.get(layer, ())]
        if splits:
            joined.append((ordered, list(dict.fromkeys(splits))))
    return joined


def _common(a: str, b: str) -> str:
    """The name of the innermost module that contains both of two modules, given by their names."""
    parts = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)
