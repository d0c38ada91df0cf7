"""Run the student once on the probe batch, and record what the search needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.widening.layers import (
    is_dense,
    is_leaf,
    layer_in_channels,
    layer_out_channels,
    mixes_channels,
)
from gpd_cli.widening.names import qualified, split_name
from gpd_cli.widening.numbers.arithmetic import Attribute, remember
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES, SCALE_NAMES
from gpd_cli.widening.numbers.calls import INDEXES, NUMBERED, Call
from gpd_cli.widening.numbers.splits import Split, splits_of
from gpd_cli.widening.observe.constants import Constants
from gpd_cli.widening.observe.events import Event, is_event, shapes, takes_a_part
from gpd_cli.widening.observe.reads import reading
from gpd_cli.widening.observe.recording import Reads, Recording
from gpd_cli.widening.running.detect_checkpointing import runs_again
from gpd_cli.widening.running.own_errors import forward_errors, own_errors
from gpd_cli.widening.running.tracing import (
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
# Functions that take running statistics, for which torch computes no gradient.
_WITH_STATISTICS = {F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm}


def record(network: nn.Module, images: Tensor) -> Recording:
    """Run a network on a probe batch, and record the run.

    Args:
        network: the student, in float64 and eval mode.
        images: the probe batch, ``[B, C, H, W]``.

    Returns:
        The recording.

    Raises:
        ForwardError: when the network does not run on the images.
        ExpansionError: when a part would run again in a backward pass of its own (reentrant
            gradient checkpointing).
    """
    position = Position(network, is_leaf)
    recorder = _Recorder(network, position)
    handles = [*position.hooks(network), *recorder.hooks(network)]
    try:
        observed = reading(network, recorder.number, recorder.tensor)
        with torch.enable_grad(), observed, recorder, forward_errors():
            # A copy, since code may change its images in place, which torch allows for no leaf.
            output = network(images.requires_grad_().clone())
    finally:
        for handle in handles:
            handle.remove()
    recording = recorder.recording
    recording.runs_again = runs_again(network, output)
    if isinstance(output, Tensor) and output.grad_fn is not None:
        recording.output = output.detach()
        recorder.finish(output)
    recorder.forget()
    return recording


@dataclass(frozen=True)
class _Leaf:
    """What is known of a leaf before it runs.

    Args:
        name: name of the leaf.
        out_channels: number of output channels; None if they widen as the input channels do.
        in_channels: number of input channels.
        is_dense: whether the leaf is a dense layer, a plain weighted sum over all input channels.
        split: for a grouped layer, how it takes its input channels apart into groups.
    """

    name: str
    out_channels: int | None
    in_channels: int
    is_dense: bool
    split: Split | None


class _Recorder(Tracer):
    """Fills a recording while the network runs.

    Args:
        network: the student.
        position: keeps track of the modules that are running.
    """

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
        self._constants = Constants()
        # A tensor that a forward replaces is no state: the wide network computes it again.
        self._own = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}

    def hooks(self, network: nn.Module) -> Iterator[Any]:
        """Register hooks that record each module's inputs and outputs."""
        for name, module in network.named_modules():
            # Attributes are read now, since reads in hooks would count as reads by the code of the
            # surrounding module.
            if is_leaf(module):
                leaf = _Leaf(
                    name,
                    layer_out_channels(module),
                    layer_in_channels(module),
                    is_dense(module),
                    _split_by_groups(module),
                )
                enter, leave = partial(self._enter_leaf, leaf), partial(self._leave_leaf, leaf)
            else:
                enter, leave = partial(self._enter, name), partial(self._leave_container, name)
            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            # What the wide network's output is compared with as well: what the module's own code
            # returns, before other hooks change it.
            yield module.register_forward_hook(leave, prepend=True)

    @own_errors()
    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [self._copy(t) for t in tensors_in([args, kwargs])]
        self.recording.inputs.setdefault(name, []).append(tensors)

    @own_errors()
    def _enter_leaf(self, leaf: _Leaf, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._enter(leaf.name, module, args, kwargs)
        x = first_tensor(args, kwargs)
        if leaf.split is not None and x is not None:
            self._seen_splits.append((split_name(leaf.name)[0], x.grad_fn, leaf.split))

    @own_errors()
    def _leave_leaf(self, leaf: _Leaf, module: nn.Module, args: Any, output: Any) -> None:
        y = first_tensor(output)
        if leaf.is_dense and y is not None:
            self.recording.layer_outputs.setdefault(leaf.name, []).append(self._copy(y))
        if y is not None and y.grad_fn is not None:
            self._nodes[y.grad_fn] = leaf.name
        if leaf.out_channels is not None:
            self.recording.out_channels[leaf.name] = leaf.out_channels
            self.recording.in_channels[leaf.name] = leaf.in_channels

    @own_errors()
    def _leave_container(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = list(tensors_in(output))
        self.recording.outputs.setdefault(name, []).append([self._copy(t) for t in tensors])
        self._ends.setdefault(name, []).extend(t.grad_fn for t in tensors)

    @own_errors()
    def number(self, owner: str, name: str, value: Any) -> Any:
        """Note a number that a container's own code reads from an attribute.

        Args:
            owner: name of the module that has the attribute.
            name: name of the attribute.
            value: the attribute's value.

        Returns:
            The value for the code, which remembers the attribute through arithmetic.
        """
        container = self._position.container
        if container is None or name.startswith("__"):
            return value
        if not name.startswith("_") and _is_numeric(name, value):
            reads = self.recording.reads.setdefault(container, Reads())
            reads.numbers[qualified(owner, name)] = value
        return remember(Attribute(owner, name), value)

    @own_errors()
    def tensor(self, owner: str, name: str, value: Tensor) -> Tensor:
        """Note a parameter or buffer that a container's own code reads.

        Args:
            owner: name of the module that has the tensor.
            name: name of the tensor in the module.
            value: the tensor.
        """
        container = self._position.container
        if container is not None and id(value) in self._own:
            full = qualified(owner, name)
            self._constants.add(value, [full])
            if value.is_floating_point():
                if value.is_leaf:
                    value.requires_grad_(True)  # buffers, too, so that their graph is recorded
                self.recording.reads.setdefault(container, Reads()).tensors[full] = value
        return value

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        execution = self._position.execution
        if execution is None:
            return func(*args, **kwargs)
        with own_errors():
            event = self._event(func, args, kwargs)
            passed = self._without_graph_of_statistics(func, args, kwargs)
        result = func(*passed[0], **passed[1])
        with own_errors():
            self._note(execution, event, func, args, kwargs, result)
        return result

    def _without_graph_of_statistics(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with running statistics detached where torch asks for this."""
        if func not in _WITH_STATISTICS:
            return args, kwargs

        def detached(value: Any) -> Any:
            is_buffer = id(value) in self._own and not isinstance(value, nn.Parameter)
            return value.detach() if is_buffer else value

        return tuple(map(detached, args)), {name: detached(v) for name, v in kwargs.items()}

    def _note(
        self,
        execution: tuple[str, int],
        event: Event | None,
        func: Any,
        args: Any,
        kwargs: Any,
        result: Any,
    ) -> None:
        """Record the effects of a call in a container's own code.

        Args:
            execution: the name of the container, and the number of the container's call.
            event: the event of the function call, which gets the result; None if it is no event.
            func: the function that was called.
            args: the function's positional arguments.
            kwargs: the function's keyword arguments.
            result: what the function returned.
        """
        if event is not None:
            event.result = shapes(result)
            self.recording.events.setdefault(execution, []).append(event)
        self._constants.derive((args, kwargs), result)
        linear = linear_call(func, args, kwargs)
        if linear is not None:
            self._note_direct_weight(*linear, result)
        if func in _ELEMENTWISE:
            self._sums.append(result.grad_fn)
        container, _ = execution
        for split in splits_of(func, args, kwargs, result):
            x = args[0] if args else kwargs["input"]
            self._seen_splits.append((container, x.grad_fn, split))

    def _note_direct_weight(self, x: Tensor, weight: Tensor, bias: Any, result: Tensor) -> None:
        """Record a weight that code passes to a linear function, if it is a parameter.

        Args:
            x: the function's input.
            weight: the function's weight, ``[out_channels, in_channels]``.
            bias: the function's bias, or None.
            result: the function's output.
        """
        name = self._parameters.get(id(weight))
        if name is None:
            return
        self.recording.inputs.setdefault(name, []).append([self._copy(x)])
        self.recording.direct[name] = self._parameters.get(id(bias))
        if isinstance(bias, Tensor) and self.recording.direct[name] is None:
            self.recording.biases[name] = bias
        self.recording.out_channels[name] = len(weight)
        self.recording.in_channels[name] = weight.shape[1]
        self._nodes[result.grad_fn] = name

    def _event(self, func: Any, args: Any, kwargs: Any) -> Event | None:
        """Make the event of a call, or None if the call is no event.

        This has to be done before the call, which may change its arguments in place.
        """
        if not is_event(func, args, kwargs, self._constants):
            return None
        tensors = list(tensors_in((args, kwargs)))
        if func in NUMBERED:
            tensors = tensors[:1]
        if func in INDEXES and not takes_a_part(Call(func, args, kwargs)):
            tensors = []
        # A constant is not copied, since its graph leads to the parameters that it comes from.
        kept = [t if self._constants.names(t) is not None else self._copy(t) for t in tensors]
        return Event(func, kept, None)

    def finish(self, logits: Tensor) -> None:
        """Derive those entries of the recording that need the whole autograd graph.

        Args:
            logits: the network's output, with its graph.
        """
        self.recording.keeps_output = self._layers_behind([logits.grad_fn])
        for name, nodes in self._ends.items():
            self.recording.ends[name] = self._layers_behind(nodes)
        for node in self._sums:
            self._finish_sum(node)
        for container, node, split in self._seen_splits:
            self._finish_split(container, node, split)

    def _finish_sum(self, node: Any) -> None:
        """Record sets of layers whose outputs are combined by a sum or product of activations.

        Layers of different numbers of output channels are in different sets.

        Args:
            node: the ``grad_fn`` of the sum or product.
        """
        out_channels = self.recording.out_channels
        layers = self._layers_behind([node]) & out_channels.keys()
        for size in {out_channels[layer] for layer in layers}:
            same_layout = {layer for layer in layers if out_channels[layer] == size}
            if len(same_layout) > 1 and same_layout not in self.recording.sums:
                self.recording.sums.append(same_layout)

    def _finish_split(self, container: str, node: Any, split: Split) -> None:
        """Record a split of an activation for each layer whose outputs are in this activation.

        Args:
            container: name of the container whose code or grouped layer takes the activation apart.
            node: the ``grad_fn`` of the activation.
            split: the split.
        """
        behind = self._layers_behind([node])
        # In the order of the run, since the order of a set differs between processes.
        for layer in self.recording.out_channels:
            if layer in behind:
                found = self.recording.splits.setdefault(layer, [])
                if (container, split) not in found:
                    found.append((container, split))

    def _layers_behind(self, nodes: Iterable[Any]) -> set[str]:
        """Names of the last layers that activations come from, see `last_layers`.

        Args:
            nodes: the activations' ``grad_fn``.
        """
        return last_layers(nodes, self._nodes, self._mixes)

    def forget(self) -> None:
        """Free the graph, whose activations take more memory than the recording itself."""
        for kept in (self._nodes, self._ends, self._seen_splits, self._sums, self._copies):
            kept.clear()

    def _mixes(self, layer: str) -> bool:
        return layer in self.recording.direct or mixes_channels(self._modules[layer])

    def _copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor's present values, which code may change in place later on."""
        key = (id(tensor), tensor._version)
        if key not in self._copies:
            # The tensor itself is kept as well, so that no other tensor gets its id.
            self._copies[key] = (tensor, tensor.detach().clone())
        return self._copies[key][1]


def _split_by_groups(module: nn.Module) -> Split | None:
    """The split of a grouped layer's input into groups; None for other layers."""
    groups = getattr(module, "groups", getattr(module, "num_groups", 1))
    size = getattr(module, "in_channels", getattr(module, "num_channels", 0))
    # Depthwise layers have no such split, since their channels may have any order.
    return Split(size, (groups, size // groups), layer=True) if 1 < groups < size else None


def last_layers(
    starts: Iterable[Any], layers: Mapping[Any, str], mixes: Callable[[str], bool]
) -> set[str]:
    """Find the last layers that some tensors come from.

    The graph is followed backwards from the tensors, on each path up to the first layer that mixes
    channels.

    Args:
        starts: the tensors' ``grad_fn``.
        layers: names of layers, by the graph node of the layer's output.
        mixes: function that says whether the layer of a name mixes channels.

    Returns:
        The names of all layers on these paths, including those that mix channels.
    """
    found: set[str] = set()
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = layers.get(node)
        if name is not None:
            found.add(name)
            if mixes(name):
                continue
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _is_numeric(name: str, value: Any) -> bool:
    if type(value) is float:
        return name in SCALE_NAMES
    if type(value) is int:
        return value > 1 or (value == 1 and name in HEAD_COUNT_NAMES)
    return bool(value) and all(type(v) is int for v in value)
