"""The recording of the student's run: what planning needs to know about the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.events import Event


@dataclass
class Reads:
    """Attributes and tensors that the own code of one container read, on any module.

    Args:
        numbers: the value of each attribute, by qualified name: integers, tuples and lists of
            integers, and factors.
        tensors: parameters and buffers by qualified name.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Recording:
    """One run of the student.

    A *layer* is a leaf module, under its own name, or a weight that code passes to a linear
    function, under the weight's name.

    Args:
        inputs: per layer the input of each call, per container all tensor arguments of each call.
        outputs: per container the tensors returned in each call.
        layer_outputs: per dense layer the output of each call.
        out_channels: number of output channels of each layer that mixes channels.
        in_channels: number of input channels of each layer that mixes channels.
        direct: weights that code passes to a linear function, with the name of their bias.
        biases: computed biases of such weights, with their graph, by the weight's name.
        reads: per container the attributes and tensors that its own code read.
        events: the events in a container's own code, per container and number of the call.
        splits: how code took a layer's outputs apart, with the container of this code, per layer.
        keeps_output: layers that keep their output channels, since their output reaches the logits
            without another layer that mixes channels in between.
        ends: per container, the layers inside whose output reaches the container's output in the
            same way.
        sums: sets of layers whose outputs are added or multiplied, and therefore need one layout.
        output: the network's output.
        runs_again: whether a backward pass would run a part of the network again.
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
