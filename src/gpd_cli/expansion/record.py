"""Run the student once and record what planning needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpd_cli.expansion.layers import is_known, is_leaf, mixes_channels

_SATURATING = {
    F.relu,
    F.relu_,
    F.relu6,
    F.hardtanh,
    F.hardswish,
    F.hardsigmoid,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.celu,
    F.selu,
    F.softplus,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
}


class InjectiveActivations(TorchFunctionMode):
    """Run a network with leaky activations, under which no channel dies.

    Which channel copies which does not depend on the activation function; but two channels that
    are zero throughout a small probe batch could not be told apart.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace activations, pass everything else on."""
        kwargs = kwargs or {}
        if func not in _SATURATING:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        y = F.leaky_relu(x, 0.3)
        in_place = kwargs.get("inplace") or func.__name__ in ("relu_",)
        return x.copy_(y) if in_place else y


def first_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among a call's arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, tuple | list):
            inner = first_tensor(value, {})
            if inner is not None:
                return inner
    return None


@dataclass
class Recording:
    """What one run of the student showed.

    Args:
        called: names of the leaves that ran.
        inputs: per leaf name, the input of each of its calls.
        outputs: per leaf name, the shape of its output.
        results: per leaf of a kind that is not known, the output of each of its calls.
        kept: leaves whose output reaches the network's output without another layer that mixes
            channels in between: they keep their width.
        ends: per container that was asked for, the leaves that reach its output so.
        output: the network's output.
    """

    called: set[str] = field(default_factory=set)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, torch.Size] = field(default_factory=dict)
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    ends: dict[str, set[str]] = field(default_factory=dict)
    output: Tensor | None = None


def record(network: nn.Module, images: Tensor, containers: Iterable[str] = ()) -> Recording:
    """Run a network on a probe batch.

    Args:
        network: the student, float64, in eval mode.
        images: the probe batch, ``[B, C, H, W]``.
        containers: names of modules whose own last leaves are wanted.

    Returns:
        The recording.
    """
    recording = Recording()
    nodes: dict[Any, str] = {}
    sources: dict[str, list[Any]] = {}
    wanted = set(containers)
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            recording.called.add(name)
            x = first_tensor(args, kwargs)
            if x is not None:
                recording.inputs.setdefault(name, []).append(x.detach().clone())

        return hook

    def leave(name: str, leaf: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            y = first_tensor((output,), {})
            if y is None or y.grad_fn is None:
                return
            if leaf:
                nodes[y.grad_fn] = name
                recording.outputs[name] = y.shape
                if not is_known(module):
                    recording.results.setdefault(name, []).append(y.detach().clone())
            if name in wanted:
                sources.setdefault(name, []).append(y.grad_fn)

        return hook

    for name, module in network.named_modules():
        leaf = is_leaf(module)
        if leaf:
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        if leaf or name in wanted:
            handles.append(module.register_forward_hook(leave(name, leaf)))
    try:
        with torch.enable_grad(), InjectiveActivations():
            output = network(images.requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(network.named_modules())
    logits = output
    if not isinstance(logits, Tensor) or logits.grad_fn is None:
        return recording
    recording.output = logits.detach()
    recording.kept = _last_leaves([logits.grad_fn], nodes, modules)
    for name, starts in sources.items():
        recording.ends[name] = _last_leaves(starts, nodes, modules)
    return recording


def _last_leaves(
    starts: list[Any], nodes: Mapping[Any, str], modules: Mapping[str, nn.Module]
) -> set[str]:
    """Walk the graph back from an output, through everything up to layers that mix channels."""
    found: set[str] = set()
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = nodes.get(node)
        if name is not None:
            found.add(name)
            if mixes_channels(modules[name]):
                continue
        stack.extend(parent for parent, _ in node.next_functions)
    return found
