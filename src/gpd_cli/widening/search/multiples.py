"""The multiple that a layer's output has to be, where it is added to a multiple of copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from gpd_cli.widening.layers import channel_axis
from gpd_cli.widening.match import match_multiple
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.plan import IndexMap, TensorPlan
from gpd_cli.widening.tensors import replicate


def output_multiple(
    recording: Recording,
    layers: Mapping[str, nn.Module],
    maps: Callable[[str], IndexMap | None],
    narrow: Tensor,
    wide: Tensor,
) -> dict[str, float]:
    """Find one layer whose output, scaled by a number, would make a sum a multiple of copies.

    Args:
        recording: the student's run.
        layers: dense layers of the student, by name.
        maps: returns the index map of a layer's outputs.
        narrow: a tensor of the student, the sum.
        wide: the same tensor in the wide network, in which the layer's output is plain copies and
            the other summands are multiples of copies.

    Returns:
        The layer with its multiple; empty where no such layer is behind the mismatch.
    """
    added = set().union(*recording.sums)
    for layer, outputs in recording.layer_outputs.items():
        for output in outputs if layer in added and layer in layers else ():
            if output.shape != narrow.shape:
                continue
            axes: list[IndexMap | None] = [None] * output.ndim
            axes[channel_axis(layers[layer])] = maps(layer)
            copies = replicate(output, TensorPlan(tuple(axes)))
            if copies.shape != wide.shape:
                continue
            rest = match_multiple(narrow - output, wide - copies)
            if rest is not None and rest[1] != 1:
                return {layer: rest[1]}
    return {}
