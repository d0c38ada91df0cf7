"""Run a network while it is widened, module by module, and try again where a guess was wrong.

Just before a layer runs, the channels of its actual input are matched by value with the recorded
ones: that says which wide channel copies which narrow one, through whatever concatenation,
shuffle or transposition led there, and the layer is widened then and there. A container tries how
its attributes, tokens and tables widen until everything inside of it works and its own output
follows the copies in its input; what worked is remembered for other modules of its class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.errors import ExpansionError
from gpd_cli.expansion.layers import (
    LayerPlan,
    UnsupportedLayerError,
    is_leaf,
    linear_tensors,
    plan_layer,
)
from gpd_cli.expansion.layout import Layout, Scale, Segment, layout_map
from gpd_cli.expansion.locate import short_text
from gpd_cli.expansion.match import match_axes
from gpd_cli.expansion.plan import IndexMap, TensorPlan, WidthPlan
from gpd_cli.expansion.record import Reads, Recording
from gpd_cli.expansion.refresh import refresh
from gpd_cli.expansion.rules import rule_for
from gpd_cli.expansion.splits import Split
from gpd_cli.expansion.tensors import expand_tensor
from gpd_cli.expansion.tracing import Tracer, first_tensor, linear_call, tensors_in
from gpd_cli.expansion.variables import (
    Assignment,
    Variable,
    assignments,
    blocks_in,
    counts_in,
    factor_variable,
    layout_variable,
    number_variable,
    tensor_variable,
)

_MOST_GUESSES = 400  # for one container where its own code fails, and
_MOST_GUESSES_OUTSIDE = 32  # where something inside of it fails for all that it tried itself
_MOST_RUNS = 40  # of the whole network, or what that comes to in runs of parts of it
_LEAST_GUESSES = 2000  # that small networks get nevertheless

_LAYER_WIDTHS = {"in_features", "out_features", "in_channels", "out_channels"}
_NO_REPLICATION = (
    "its input is not a replication of the student's input, because something before it mixes "
    "channels by position"
)

_Sizes = tuple[dict[int, list[IndexMap]], set[int]]


class Mismatch(Exception):  # noqa: N818 - an outcome of a trial, not an error
    """A guess did not work out.

    Args:
        name: the module where that showed.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


class Widening(Tracer):
    """One run of a copy of the network that is widened on the way.

    Args:
        narrow: the student, float64, in eval mode.
        recording: what its run on the probe batch showed.
        scale: how much wider.
        exclude: patterns of layer names whose outputs keep their width.
    """

    def __init__(
        self, narrow: nn.Module, recording: Recording, scale: Scale, exclude: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.plan = WidthPlan(scale.ratio)
        self._narrow = narrow
        self._modules = dict(narrow.named_modules())
        self._recording = recording
        self._scale = scale
        self._kept = recording.kept | _excluded(self._layers(), exclude)
        self._wide = _copy_sharing_tensors(narrow)
        self._splits = self._splits_by_container()
        self._calls: dict[str, int] = {}
        self._found: dict[str, tuple[IndexMap | None, ...]] = {}
        self._layouts: dict[str, Layout] = {}
        self._settled: set[str] = set()
        self._remembered: dict[type, list[Mapping[str, str]]] = {}
        self._guesses, self._runs = 0, 0.0
        self._given_up: Mismatch | None = None

    def run(self, images: Tensor) -> WidthPlan:
        """Widen while running.

        Args:
            images: the probe batch that was recorded.

        Raises:
            ExpansionError: when a module cannot be widened exactly.
        """
        for name, module in self._wide.named_modules():
            if is_leaf(module):
                module.register_forward_pre_hook(self._layer_hook(name), with_kwargs=True)
            elif getattr(module.forward, "__func__", None) is not nn.Module.forward:
                module.forward = self._container(name, module.forward)
        try:
            with torch.no_grad(), self:
                self._wide(images.clone())
            if self._given_up is not None and not self.plan.tensors:
                raise self._given_up  # that nothing widens at all is no way out
        except Mismatch as failure:
            title = _title(failure.name, self._modules)
            raise ExpansionError(
                f"{title} cannot be widened: {failure.reason}; keep the layers that feed it narrow "
                "(exclude), choose another ratio, or give a rule for its class (RULES)."
            ) from failure
        self._drop_idle_attributes()
        return self.plan

    def _drop_idle_attributes(self) -> None:
        """Undo the widths that a guess set on layers that did not widen after all."""
        for name, attributes in self.plan.attributes.items():
            tensors = dict(self._modules[name].named_parameters(recurse=False))
            widened = any(f"{name}.{local}" in self.plan.tensors for local in tensors)
            if is_leaf(self._modules[name]) and tensors and not widened:
                for attribute in _LAYER_WIDTHS & attributes.keys():
                    del attributes[attribute]
        self.plan.attributes = {name: a for name, a in self.plan.attributes.items() if a}

    # Layers

    def _layer_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_tensor(args, kwargs)
            axes = None if x is None else self._axes(name, x)
            if axes is None:
                return
            try:
                layer = plan_layer(
                    self._modules[name],
                    axes,
                    self._scale,
                    keep_output=name in self._kept,
                    layout=self._layout(name),
                )
            except UnsupportedLayerError as error:
                raise Mismatch(name, str(error)) from error
            self._apply(name, layer)

        return hook

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Widen weights that a linear function is called with directly."""
        linear = linear_call(func, args, kwargs) if self._recording.direct else None
        name = None if linear is None else self._direct_name(linear[1])
        if linear is None or name is None:
            return func(*args, **kwargs)
        x, weight, bias = linear
        axes = self._axes(name, x)
        owns = bias is not None and self._recording.direct[name] is not None
        if axes is not None:
            inputs = axes[x.ndim - weight.ndim + 1] if weight.ndim > 2 else axes[-1]
            out = None if name in self._kept else self._map(name)
            if inputs is None and any(axes):
                out = None
            tensors = linear_tensors(weight.ndim, owns, out, inputs)
            if "bias" in tensors:
                tensors[self._recording.direct[name] or ""] = tensors.pop("bias")
            if "weight" in tensors:
                tensors[name] = tensors.pop("weight")
            self._apply("", LayerPlan(tensors))
        named = {"input": x, "weight": self._tensor(name), "bias": bias}
        if owns:
            named["bias"] = self._tensor(self._recording.direct[name] or "")
        rest = {k: v for k, v in kwargs.items() if k not in named}
        return func(named["input"], named["weight"], named["bias"], *args[3:], **rest)

    def _direct_name(self, weight: Any) -> str | None:
        for name in self._recording.direct:
            if weight is self._tensor(name) or weight is _tensor(self._narrow, name):
                return name
        return None

    def _axes(self, name: str, x: Tensor) -> tuple[IndexMap | None, ...] | None:
        """How the input of a layer widened; None where the layer is planned already."""
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        recorded = self._recording.inputs.get(name, [])
        if call >= len(recorded) or not recorded[call]:
            return None
        axes = match_axes(recorded[call][0], x)
        if axes is None:
            raise Mismatch(name, _NO_REPLICATION)
        if call == 0:
            self._found[name] = axes
            return axes
        if axes != self._found[name]:
            raise Mismatch(name, "it is called several times, with inputs that widen differently")
        return None

    def _layout(self, name: str) -> Layout | None:
        size = self._recording.sizes.get(name)
        if name in self._layouts or size is None:
            return self._layouts.get(name)
        return (Segment(size, grows=size > 1),)

    def _map(self, name: str) -> IndexMap | None:
        layout = self._layout(name)
        return None if layout is None else layout_map(layout, self._scale)

    # Containers

    def _container(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            recorded = self._recording.outputs.get(name, [])
            if call >= len(recorded):
                return forward(*args, **kwargs)

            def attempt() -> Any:
                output = forward(*args, **kwargs)
                self._check(name, recorded[call], output)
                return output

            if name in self._settled:
                return attempt()
            return self._try(name, attempt, self._known(name, call, (args, kwargs)))

        return run

    def _try(self, name: str, attempt: Callable[[], Any], known: _Sizes) -> Any:
        """Run a container with one guess after the other."""
        before = self._state()
        variables = self._variables(name, known)
        reads = self._recording.reads.get(name)
        cls = type(self._modules[name])
        share = self._layers_in(name) / max(1, len(self._recording.sizes))
        containers = self._containers_in(name)
        limit = _MOST_GUESSES
        failure: Mismatch | None = None
        guesses = assignments(variables, counts_in(variables, reads), self._remembered.get(cls, ()))
        for number, guess in enumerate(guesses):
            if number >= limit or (self._runs > _MOST_RUNS and self._guesses > _LEAST_GUESSES):
                break
            self._guesses += 1
            self._runs += share
            refresh(self._wide.get_submodule(name))
            try:
                self._adopt(variables, guess)
                output = attempt()
                if not name and failure is not None and not self.plan.tensors:
                    raise failure
            except Mismatch as mismatch:
                failure = failure or mismatch
                if mismatch.name in containers:
                    limit = min(limit, _MOST_GUESSES_OUTSIDE)
            except Exception as error:
                reason = f"at this width its forward does not run ({short_text(error)})"
                failure = failure or Mismatch(name, reason)
            else:
                self._settled.add(name)
                self._remember(cls, name, variables, guess)
                return output
            self._restore(before)
        assert failure is not None
        # The last resort: what fails inside of a module, or is handed on from one to the next in
        # it, stays as it is.
        within = failure.name in containers
        narrow = self._stream_layers(name) if within else self._inner_layers(name)
        if not name or not narrow:
            raise failure
        self._layouts.update(narrow)
        self.plan.narrow += (name,)
        try:
            output = attempt()
        except Exception:
            self._restore(before)
            raise failure from None
        self._given_up = self._given_up or failure
        self._settled.add(name)
        return output

    def _inner_layers(self, name: str) -> dict[str, Layout]:
        """The layers inside of a container whose outputs do not leave it, kept narrow."""
        ends = self._recording.ends.get(name, set())
        return self._kept_narrow(name, self._recording.sizes.keys() - ends)

    def _stream_layers(self, name: str) -> dict[str, Layout]:
        """The layers inside of a container whose outputs leave one of its parts, kept narrow."""
        parts = [part for part, _ in self._modules[name].named_children()]
        ends = [self._recording.ends.get(f"{name}.{part}", set()) for part in parts]
        return self._kept_narrow(name, set().union(*ends))

    def _kept_narrow(self, name: str, layers: Iterable[str]) -> dict[str, Layout]:
        """A layout that does not widen, for layers inside of a container."""
        return {
            layer: (Segment(self._recording.sizes[layer], grows=False),)
            for layer in layers
            if layer.startswith(f"{name}.") and layer in self._recording.sizes
        }

    def _check(self, name: str, recorded: list[Tensor], output: Any) -> None:
        tensors = list(tensors_in(output))
        exact = len(tensors) == len(recorded)
        for narrow, wide in zip(recorded, tensors, strict=False):
            axes = match_axes(narrow, wide)
            # The network's own output may not widen at all.
            exact = exact and axes is not None and (bool(name) or narrow.shape == wide.shape)
        if not exact:
            raise Mismatch(
                name,
                "its output does not follow the copies in its input: it mixes or cuts channels by "
                "their position, or counts them",
            )

    def _known(self, name: str, call: int, arguments: Any) -> _Sizes:
        """By what maps axes of each size widen around here, and which sizes of inputs do not."""
        known: dict[int, list[IndexMap]] = {}

        def add(map_: IndexMap | None) -> None:
            if map_ is not None and map_ not in known.setdefault(map_.narrow, []):
                known[map_.narrow].append(map_)

        fixed: set[int] = set()
        recorded = self._recording.inputs.get(name, [])[call]
        for narrow, wide in zip(recorded, tensors_in(arguments), strict=False):
            axes = match_axes(narrow, wide)
            if axes is None:
                raise Mismatch(name, _NO_REPLICATION)
            for size, map_ in zip(narrow.shape, axes, strict=True):
                add(map_)
                fixed.update({size} if map_ is None else ())
        prefix = f"{name}." if name else ""
        for layer, size in self._recording.sizes.items():
            if layer.startswith(prefix) and layer not in self._kept and size > 1:
                add(layout_map((Segment(size),), self._scale))
        return known, fixed

    def _variables(self, name: str, sizes: _Sizes) -> list[Variable]:
        """What may widen in a container besides its layers."""
        known, fixed = sizes
        rule, prefix = rule_for(self._modules[name]), f"{name}." if name else ""
        reads = self._recording.reads.get(name, Reads())
        layouts = []
        for (size, splits), layers in self._alike(name, rule.blocks).items():
            local = layers[0].removeprefix(prefix)
            layouts.append(layout_variable(layers, size, splits, self._scale, rule, local))
        # Numbers may also tell how many inputs a layer inside has.
        widths = dict(known)
        for layer, width in self._recording.widths.items():
            if layer.startswith(prefix) and width > 1 and width not in fixed:
                widths.setdefault(width, [Segment(width).map(self._scale)])
        numbers = [
            factor_variable(attribute, value, self._scale, rule)
            if isinstance(value, float)
            else number_variable(attribute, value, widths, self._scale, rule)
            for attribute, value in reads.numbers.items()
            if self._is_open(attribute)
        ]
        blocks = blocks_in(layouts)
        direct = {*self._recording.direct, *self._recording.direct.values()}
        tensors = [
            tensor_variable(tensor, value.shape, known, blocks, self._scale, rule)
            for tensor, value in reads.tensors.items()
            if tensor not in direct
            and tensor not in self.plan.tensors
            and not self._is_layers(tensor)
        ]
        # One that can only stay as it is leaves nothing to decide.
        decided = ("keep", "plain")
        everything = (*numbers, *tensors, *layouts)
        return [v for v in everything if len(v.options) > 1 or v.first not in decided]

    def _alike(
        self, name: str, ruled: Iterable[str]
    ) -> dict[tuple[int, tuple[Split, ...]], tuple[str, ...]]:
        """Layers whose layout a container decides: together, where they are taken apart alike."""
        prefix = f"{name}." if name else ""
        splits: dict[str, Sequence[Split]] = {prefix + local: () for local in ruled}
        splits.update(self._splits.get(name, {}))
        alike: dict[tuple[int, tuple[Split, ...]], tuple[str, ...]] = {}
        for layer, found in splits.items():
            size = self._recording.sizes.get(layer)
            if size and layer not in self._kept and layer not in self._layouts:
                key = (size, tuple(found))
                alike[key] = (*alike.get(key, ()), layer)
        return alike

    def _is_open(self, attribute: str) -> bool:
        """Whether an attribute is an instance's own and not settled yet."""
        owner, _, local = attribute.rpartition(".")
        settled = local in self.plan.attributes.get(owner, {})
        return not settled and local in self._modules[owner].__dict__

    def _is_layers(self, tensor: str) -> bool:
        """Whether a tensor belongs to a layer that is planned when it runs."""
        owner = tensor.rpartition(".")[0]
        return owner in self._recording.inputs and is_leaf(self._modules[owner])

    def _adopt(self, variables: Sequence[Variable], guess: Assignment) -> None:
        for variable, label in zip(variables, guess, strict=True):
            value = variable.options[label]
            owner, _, local = variable.names[0].rpartition(".")
            if variable.kind == "layout":
                if label != "plain":  # else it is left to containers further inside
                    self._layouts.update(dict.fromkeys(variable.names, value))
            elif value is not None and variable.kind == "number":
                self._apply(owner, LayerPlan(attributes={local: value}))
            elif value is not None:
                self._apply(owner, LayerPlan({local: value}))

    def _remember(
        self, cls: type, name: str, variables: Sequence[Variable], guess: Assignment
    ) -> None:
        prefix = f"{name}." if name else ""
        labels = {v.names[0].removeprefix(prefix): g for v, g in zip(variables, guess, strict=True)}
        known = self._remembered.setdefault(cls, [])
        if labels not in known:
            known.insert(0, labels)

    def _splits_by_container(self) -> dict[str, dict[str, list[Split]]]:
        """Per container the layers in it whose outputs are taken apart in it."""
        found: dict[str, dict[str, list[Split]]] = {}
        for layers, splits in self._layers_that_lie_alike():
            parents = [layer.rpartition(".")[0] for layer in layers]
            if len(layers) == 1:
                for container, split in splits:
                    common = _common(container, parents[0])
                    found.setdefault(common, {}).setdefault(layers[0], []).append(split)
                continue
            common = reduce(_common, [*parents, *(container for container, _ in splits)])
            for layer in layers:
                found.setdefault(common, {})[layer] = list(dict.fromkeys(s for _, s in splits))
        return found

    def _layers_that_lie_alike(self) -> list[tuple[list[str], list[tuple[str, Split]]]]:
        """Layers with what takes their outputs apart; those that are added to each other as one.

        Copies side by side line up anyway when every channel has as many copies as the next.
        """
        groups = [{layer} for layer in self._recording.splits]
        if self._scale.multiple > 1 or not float(self._scale.ratio).is_integer():
            for layers in self._recording.sums:
                apart = [group for group in groups if not group & layers]
                groups = [*apart, layers.union(*(group for group in groups if group & layers))]
        joined = []
        for group in groups:
            splits = [s for layer in group for s in self._recording.splits.get(layer, ())]
            if splits:
                order = [layer for layer in self._recording.sizes if layer in group]
                joined.append((order, list(dict.fromkeys(splits))))
        return joined

    # The wide network's state

    def _apply(self, name: str, layer: LayerPlan) -> None:
        prefix = f"{name}." if name else ""
        module = self._wide.get_submodule(name)
        for attribute, value in layer.attributes.items():
            setattr(module, attribute, value)
            self.plan.attributes.setdefault(name, {})[attribute] = value
        for local, plan in layer.tensors.items():
            self._set(prefix + local, expand_tensor(_tensor(self._narrow, prefix + local), plan))
            self.plan.tensors[prefix + local] = plan

    def _state(self) -> tuple[Any, ...]:
        attributes = {name: dict(values) for name, values in self.plan.attributes.items()}
        tracked = (self._calls, self._found, self._layouts, self._settled, self.plan.tensors)
        return (attributes, self.plan.narrow, *(copy.copy(value) for value in tracked))

    def _restore(self, state: tuple[Any, ...]) -> None:
        attributes, self.plan.narrow, *tracked = state
        for name, values in self.plan.attributes.items():
            for attribute in values:
                narrow = getattr(self._modules[name], attribute)
                value = attributes.get(name, {}).get(attribute, narrow)
                setattr(self._wide.get_submodule(name), attribute, value)
        tensors: dict[str, TensorPlan] = tracked[-1]
        for name in self.plan.tensors:
            if name not in tensors:
                self._set(name, _tensor(self._narrow, name))
        self.plan.attributes = {name: dict(values) for name, values in attributes.items()}
        self._calls, self._found, self._layouts, self._settled, self.plan.tensors = (
            copy.copy(value) for value in tracked
        )

    def _tensor(self, name: str) -> Tensor:
        return _tensor(self._wide, name)

    def _set(self, name: str, tensor: Tensor) -> None:
        owner, _, local = name.rpartition(".")
        module = self._wide.get_submodule(owner)
        if local in module._buffers:
            module._buffers[local] = tensor
        else:
            module._parameters[local] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
            )

    def _layers(self) -> list[str]:
        leaves = [name for name, module in self._modules.items() if is_leaf(module)]
        return [*leaves, *self._recording.direct]

    def _containers_in(self, name: str) -> set[str]:
        prefix = f"{name}." if name else ""
        return {c for c in self._recording.outputs if c.startswith(prefix) and c != name}

    def _layers_in(self, name: str) -> int:
        prefix = f"{name}." if name else ""
        return sum(layer.startswith(prefix) for layer in self._recording.sizes)


def _copy_sharing_tensors(network: nn.Module) -> nn.Module:
    """A copy of the modules, with the very same parameters and buffers."""
    memo = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, memo)


def _tensor(network: nn.Module, name: str) -> Tensor:
    owner, _, local = name.rpartition(".")
    tensor = getattr(network.get_submodule(owner), local)
    assert isinstance(tensor, Tensor)
    return tensor


def _common(a: str, b: str) -> str:
    """The innermost module that contains both."""
    parts = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)


def _excluded(layers: Sequence[str], patterns: str | Sequence[str]) -> set[str]:
    excluded = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {
            layer
            for layer in layers
            if fnmatchcase(layer, pattern) or layer.startswith(f"{pattern}.")
        }
        if not found:
            raise ExpansionError(
                f"No layer is named '{pattern}'; give patterns of layer names to exclude, such as "
                f"'{layers[0] if layers else 'layer4.*'}'."
            )
        excluded |= found
    return excluded


def _title(name: str, modules: Mapping[str, nn.Module]) -> str:
    if name not in modules:
        name = name.rpartition(".")[0]
    return f"{name or 'the network'} ({type(modules[name]).__name__})"
