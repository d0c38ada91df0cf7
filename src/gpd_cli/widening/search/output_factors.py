"""Find the factor of a layer's output that is added to a multiple of copies.

A norm or a sum over copied channels leads to such multiples. The outputs of layers that are added
to them have to be multiplied by the same factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from gpd_cli.widening.layers import channel_axis
from gpd_cli.widening.match import match_multiple
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.plan import IndexMap, TensorPlan
from gpd_cli.widening.tensors import replicate


def output_factor(
    recording: Recording,
    layers: Mapping[str, nn.Module],
    maps: Callable[[str], IndexMap | None],
    narrow: Tensor,
    wide: Tensor,
) -> dict[str, float]:
    """Find a layer whose output has to be scaled, so that a sum becomes a multiple of copies.

    Args:
        recording: the student's run.
        layers: dense layers of the student, by name.
        maps: function that returns the index map of a layer's outputs, by the layer's name.
        narrow: the sum in the student.
        wide: the same sum in the wide network, in which the layer's output consists of plain
            copies, while the other summands are multiples of copies.

    Returns:
        The factor by layer name, for a single layer; empty if no layer explains the mismatch.
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
            if rest is not None and rest.factor != 1:
                return {layer: rest.factor}
    return {}
