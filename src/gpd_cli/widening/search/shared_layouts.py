"""Whose decision the layout of each layer's outputs is, and which layers have to lie alike."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from gpd_cli.widening.layout import Scale
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.record import Recording


def splits_by_container(recording: Recording, scale: Scale) -> dict[str, dict[str, list[Split]]]:
    """Per container the layers in it whose outputs are taken apart in it.

    Args:
        recording: of the student.
        scale: how much wider.

    Returns:
        Per container, per layer, what takes its outputs apart; a layer belongs to the innermost
        container that has both it and the code that does so.
    """
    found: dict[str, dict[str, list[Split]]] = {}
    for layers, splits in _layers_that_lie_alike(recording, scale):
        parents = [layer.rpartition(".")[0] for layer in layers]
        if len(layers) == 1:
            for container, split in splits:
                common = _common(container, parents[0])
                # What a module elsewhere calls its heads are plain channels to those in between.
                known = split if common == container else replace(split, names=())
                found.setdefault(common, {}).setdefault(layers[0], []).append(known)
            continue
        common = reduce(_common, [*parents, *(container for container, _ in splits)])
        for layer in layers:
            found.setdefault(common, {})[layer] = list(dict.fromkeys(s for _, s in splits))
    return found


def _layers_that_lie_alike(
    recording: Recording, scale: Scale
) -> list[tuple[list[str], list[tuple[str, Split]]]]:
    """Layers with what takes their outputs apart; those that are added to each other as one.

    Copies side by side line up anyway when every channel has as many copies as the next.
    """
    groups = [{layer} for layer in recording.splits]
    if scale.multiple > 1 or not float(scale.ratio).is_integer():
        for layers in recording.sums:
            apart = [group for group in groups if not group & layers]
            groups = [*apart, layers.union(*(group for group in groups if group & layers))]
    joined = []
    for group in groups:
        splits = [s for layer in group for s in recording.splits.get(layer, ())]
        if splits:
            order = [layer for layer in recording.sizes if layer in group]
            joined.append((order, list(dict.fromkeys(splits))))
    return joined


def _common(a: str, b: str) -> str:
    """The innermost module that contains both."""
    parts = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)
