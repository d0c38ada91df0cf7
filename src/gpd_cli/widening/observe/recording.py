"""The recording of the student's run: what the search needs to know about the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.events import Event


@dataclass
class Reads:
    """Attributes and tensors of any modules that the own code of one container has read.

    Args:
        numbers: values of attributes (integers, tuples and lists of integers, factors of products),
            by qualified name.
        tensors: parameters and buffers, by qualified name.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Recording:
    """What was recorded in one run of the student.

    A *layer* here is a leaf module, under its own name, or a weight that code passes to a linear
    function (a direct weight), under the weight's name.

    Args:
        inputs: for each call of a layer its input, and for each call of a container all its tensor
            arguments; by name of the layer or container.
        outputs: for each call of a container the tensors that it returned, by container name.
        layer_outputs: for each call of a dense layer its output, by layer name.
        out_channels: numbers of output channels of the layers that mix channels, by layer name.
        in_channels: numbers of input channels of the layers that mix channels, by layer name.
        direct: names of the direct weights' biases, by name of the weight; None for a bias that is
            computed or missing.
        biases: the computed biases of direct weights, with their graph, by name of the weight.
        reads: the attributes and tensors that a container's own code read, by container name.
        events: the events in a container's own code, by container name and number of the call.
        splits: how code took a layer's outputs apart, each with the name of the container of this
            code; by layer name.
        keeps_output: names of the layers that keep their output channels, since no other layer that
            mixes channels lies between them and the logits.
        ends: names of the layers in a container such that no other layer that mixes channels lies
            between them and the container's output, by container name.
        sums: sets of layers whose outputs are added or multiplied, and therefore need one layout.
        output: the network's output.
        runs_again: whether the backward pass would run a part of the network again.
    """

    inputs: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    outputs: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    layer_outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    out_channels: dict[str, int] = field(default_factory=dict)
    in_channels: dict[str, int] = field(default_factory=dict)
    direct: dict[str, str | None] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    reads: dict[str, Reads] = field(default_factory=dict)
    events: dict[tuple[str, int], list[Event]] = field(default_factory=dict)
    splits: dict[str, list[tuple[str, Split]]] = field(default_factory=dict)
    keeps_output: set[str] = field(default_factory=set)
    ends: dict[str, set[str]] = field(default_factory=dict)
    sums: list[set[str]] = field(default_factory=list)
    output: Tensor | None = None
    runs_again: bool = False
