"""Run the student once and record what planning needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.expansion.layers import input_size, is_leaf, mixes_channels, output_size
from gpd_cli.expansion.probing.checkpointing import refuse_checkpointing
from gpd_cli.expansion.probing.graph import last_layers
from gpd_cli.expansion.probing.rules import COUNTS, FACTORS
from gpd_cli.expansion.probing.splits import Split, splits_of
from gpd_cli.expansion.probing.tracing import (
    Position,
    Tracer,
    first_tensor,
    linear_call,
    tensors_in,
)

_ELEMENTWISE = {
    *(Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__, torch.add),
    *(Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__, torch.mul),
}


@dataclass
class Reads:
    """What the own code of one container read, on whatever module it found it.

    Args:
        numbers: per qualified name of an attribute, its value: integers, tuples and lists of them,
            and factors.
        tensors: qualified names of parameters and buffers.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Recording:
    """What one run of the student showed.

    A *layer* is a leaf module by its name, or a weight that a linear function was called with
    directly, by the weight's name.

    Args:
        inputs: per layer the input of each call, per container all of its tensor arguments.
        outputs: per container the tensors it returned in each call.
        sizes: per layer that mixes channels, its number of outputs.
        widths: likewise its number of inputs.
        direct: weights that linear functions were called with directly, with their bias.
        reads: per container what its own code read.
        splits: per layer, how code took its outputs apart, with the container that did.
        kept: layers whose output reaches the network's output without another layer that mixes
            channels in between: they keep their width.
        ends: likewise per container, the layers inside of it that its output comes from.
        sums: sets of layers whose outputs are added or multiplied, so that they have to lie alike.
        output: the network's output.
    """

    inputs: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    outputs: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    direct: dict[str, str | None] = field(default_factory=dict)
    reads: dict[str, Reads] = field(default_factory=dict)
    splits: dict[str, list[tuple[str, Split]]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    ends: dict[str, set[str]] = field(default_factory=dict)
    sums: list[set[str]] = field(default_factory=list)
    output: Tensor | None = None


def record(network: nn.Module, images: Tensor) -> Recording:
    """Run a network on a probe batch.

    Args:
        network: the student, float64, in eval mode.
        images: the probe batch, ``[B, C, H, W]``.

    Returns:
        The recording.

    Raises:
        ExpansionError: when a backward pass would run a part of the network again.
    """
    position = Position(network, is_leaf)
    recorder = _Recorder(network, position)
    handles = [*position.hooks(network), *recorder.hooks(network)]
    try:
        with torch.enable_grad(), recorder, _reads(network, position, recorder.recording):
            output = network(images.requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    refuse_checkpointing(network, output)
    recording = recorder.recording
    if not isinstance(output, Tensor) or output.grad_fn is None:
        return recording
    recording.output = output.detach()
    recorder.finish(output)
    return recording


class _Recorder(Tracer):
    """Fills a recording while the network runs."""

    def __init__(self, network: nn.Module, position: Position) -> None:
        super().__init__()
        self.recording = Recording()
        self._position = position
        self._modules = dict(network.named_modules())
        self._parameters = {id(p): name for name, p in network.named_parameters()}
        self._nodes: dict[Any, str] = {}
        self._ends: dict[str, list[Any]] = {}
        self._seen_splits: list[tuple[str, Any, Split]] = []
        self._sums: list[Any] = []
        self._copies: dict[Any, tuple[Tensor, Tensor]] = {}

    def hooks(self, network: nn.Module) -> Iterator[Any]:
        """Register what records each module's inputs and outputs."""
        for name, module in network.named_modules():
            # Looked up now: what hooks read would be taken for reads of the module around.
            leaf, sizes = is_leaf(module), (output_size(module), input_size(module))
            split = _split_by_groups(module) if leaf else None

            def enter(
                module: nn.Module, args: Any, kwargs: Any, name: str = name, split: Any = split
            ) -> None:
                tensors = [self._copy(t) for t in tensors_in([args, kwargs])]
                self.recording.inputs.setdefault(name, []).append(tensors)
                x = first_tensor(args, kwargs)
                if split is not None and x is not None:
                    self._seen_splits.append((name.rpartition(".")[0], x.grad_fn, split))

            def leave_layer(
                module: nn.Module, args: Any, output: Any, name: str = name, sizes: Any = sizes
            ) -> None:
                y = first_tensor(output)
                if y is not None and y.grad_fn is not None:
                    self._nodes[y.grad_fn] = name
                if sizes[0] is not None:
                    self.recording.sizes[name], self.recording.widths[name] = sizes

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                tensors = list(tensors_in(output))
                self.recording.outputs.setdefault(name, []).append([self._copy(t) for t in tensors])
                self._ends.setdefault(name, []).extend(t.grad_fn for t in tensors)

            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            yield module.register_forward_hook(leave_layer if leaf else leave)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        container = self._position.container
        result = func(*args, **kwargs)
        if container is None:
            return result
        linear = linear_call(func, args, kwargs)
        weight = None if linear is None else self._parameters.get(id(linear[1]))
        if linear is not None and weight is not None:
            self.recording.inputs.setdefault(weight, []).append([self._copy(linear[0])])
            self.recording.direct[weight] = self._parameters.get(id(linear[2]))
            self.recording.sizes[weight] = len(linear[1])
            self.recording.widths[weight] = linear[1].shape[1]
            self._nodes[result.grad_fn] = weight
        if func in _ELEMENTWISE:
            self._sums.append(result.grad_fn)
        for split in splits_of(func, args, kwargs, result):
            x = args[0] if args else kwargs["input"]
            self._seen_splits.append((container, x.grad_fn, split))
        return result

    def finish(self, logits: Tensor) -> None:
        """Draw the conclusions that need the whole graph."""
        self.recording.kept = last_layers([logits.grad_fn], self._nodes, self._mixes)
        for name, nodes in self._ends.items():
            self.recording.ends[name] = last_layers(nodes, self._nodes, self._mixes)
        for node in self._sums:
            layers = last_layers([node], self._nodes, self._mixes) & self.recording.sizes.keys()
            for size in {self.recording.sizes[layer] for layer in layers}:
                alike = {layer for layer in layers if self.recording.sizes[layer] == size}
                if len(alike) > 1 and alike not in self.recording.sums:
                    self.recording.sums.append(alike)
        for container, node, split in self._seen_splits:
            for layer in last_layers([node], self._nodes, self._mixes):
                if layer in self.recording.sizes:
                    found = self.recording.splits.setdefault(layer, [])
                    if (container, split) not in found:
                        found.append((container, split))

    def _mixes(self, layer: str) -> bool:
        return layer in self.recording.direct or mixes_channels(self._modules[layer])

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy that later changes in place leave alone, one for each state of a tensor."""
        key = (id(tensor), tensor._version)
        if key not in self._copies:
            # The tensor itself is kept as well, so that no other one gets its identity.
            self._copies[key] = (tensor, tensor.detach().clone())
        return self._copies[key][1]


def _split_by_groups(module: nn.Module) -> Split | None:
    """How a grouped layer takes its input apart."""
    groups = getattr(module, "groups", getattr(module, "num_groups", 1))
    size = getattr(module, "in_channels", getattr(module, "num_channels", 0))
    # Depthwise layers follow their input in whatever order.
    return Split(size, (groups, size // groups), layer=True) if 1 < groups < size else None


@contextmanager
def _reads(network: nn.Module, position: Position, recording: Recording) -> Iterator[None]:
    """Record which attributes and tensors the own code of each container reads."""

    def numbers(owner: str, name: str, value: Any) -> None:
        container = position.container
        if container is not None and name[:1] != "_" and _is_numeric(name, value):
            reads = recording.reads.setdefault(container, Reads())
            reads.numbers[f"{owner}.{name}" if owner else name] = value

    # What forward replaces is no state: it is computed again, from what has widened.
    own = {id(t) for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()}

    def tensors(owner: str, name: str, value: Any) -> None:
        container = position.reader
        if container is not None and id(value) in own:
            reads = recording.reads.setdefault(container, Reads())
            reads.tensors[f"{owner}.{name}" if owner else name] = value

    classes = {module: type(module) for module in network.modules()}
    for name, module in network.named_modules():
        module.__class__ = _reading(type(module), name, numbers, tensors)
    try:
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


def _reading(cls: type, owner: str, numbers: Callable[..., None], tensors: Any) -> type:
    """A subclass whose attribute reads are reported: numbers, parameters and buffers."""

    def get(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)  # type: ignore[call-arg]
        if type(value) in (int, float, tuple, list):
            numbers(owner, name, value)
        return value

    def missing(self: Any, name: str) -> Any:
        value = cls.__getattr__(self, name)  # type: ignore[attr-defined]
        tensors(owner, name, value)
        return value

    return type(cls.__name__, (cls,), {"__getattribute__": get, "__getattr__": missing})


def _is_numeric(name: str, value: Any) -> bool:
    if type(value) is float:
        return name in FACTORS
    if type(value) is int:
        return value > 1 or (value == 1 and name in COUNTS)
    return bool(value) and all(type(v) is int for v in value)
