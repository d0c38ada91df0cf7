"""Run a network while it is widened, module by module.

Just before a layer runs, the channels of its input are matched by value with the channels of the
recorded input. The match gives the index map, whatever concatenations, shuffles or transpositions
led there, and the layer is widened at once. The own code of a container gets the numbers and
constants that fit the copies (`follow`); once the container has run, its attributes, tokens and
tables are solved for. The layouts of its layers are found by trial, the likeliest first; what
worked is remembered for other modules of the same class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpd_cli.widening.layers import (
    LayerPlan,
    UnsupportedLayerError,
    is_dense,
    is_leaf,
    linear_tensors,
    plan_layer,
    rescaled,
)
from gpd_cli.widening.layout import Layout, Scale, Segment, layout_map
from gpd_cli.widening.mismatch import Match, Mismatch, UnfitMultiple, times
from gpd_cli.widening.numbers.arithmetic import Attribute, remember
from gpd_cli.widening.numbers.calls import Call
from gpd_cli.widening.observe.reads import reading
from gpd_cli.widening.observe.record import Recording
from gpd_cli.widening.plan import IndexMap, TensorPlan, WidthPlan
from gpd_cli.widening.rules import Rule, rule_for
from gpd_cli.widening.running.locate import short_text
from gpd_cli.widening.running.own_errors import own_errors
from gpd_cli.widening.running.refresh import refresh
from gpd_cli.widening.running.tracing import (
    Tracer,
    first_tensor,
    linear_call,
    replace_tensors,
    tensors_in,
)
from gpd_cli.widening.search.choices import Choices, MapsInUse
from gpd_cli.widening.search.cut_layouts import cut_layouts
from gpd_cli.widening.search.exclusion import excluded_layers
from gpd_cli.widening.search.follow import Following, Frame
from gpd_cli.widening.search.kept_narrow import inner_layers, stream_layers
from gpd_cli.widening.search.multiples import output_multiples
from gpd_cli.widening.search.trial_order import Assignment, assignments, counts_in
from gpd_cli.widening.search.trials import MOST_TRIALS, Trials
from gpd_cli.widening.search.variables import Variable
from gpd_cli.widening.search.wide_network import WideNetwork
from gpd_cli.widening.tensors import widen

Confirmation = Literal["none", "copied", "computed"]
"""How the widened network is run once more with the numbers that its own code computes.

With ``copied``, the outputs of dense layers are copies of the student's, as in the widening run;
with ``computed``, every layer computes its output from its wide weights.
"""

_MOST_ARITHMETIC = 4  # trials of a container after a failure that no numbers help against


class Widening(Tracer):
    """One run of a copy of the student that is widened on the way.

    Args:
        narrow: the student, float64, in eval mode.
        recording: the student's run on the probe batch.
        scale: how much wider the network gets.
        exclude: patterns of names of layers that keep their output channels.
        by_trial: containers whose numbers are found by trial, since the solution was wrong.
        multiples: whether activations may be multiples of copies.
        trials: counts the trials, with those of earlier runs; by default from 0.

    Attributes:
        withholds_multiples: whether something stays narrow that multiples of copies might widen.
    """

    def __init__(
        self,
        narrow: nn.Module,
        recording: Recording,
        scale: Scale,
        exclude: Sequence[str] = (),
        by_trial: Collection[str] = (),
        multiples: bool = False,
        trials: Trials | None = None,
    ) -> None:
        super().__init__()
        self._trials = trials or Trials()
        self._wide = WideNetwork(narrow, scale.ratio)
        self._modules = self._wide.modules
        self._recording = recording
        self._scale = scale
        self._kept = recording.kept | excluded_layers(self._layers(), exclude)
        self._choices = Choices(self._wide, recording, scale, self._kept)
        self._by_trial = by_trial
        self._calls: dict[str, int] = {}
        self._inputs: dict[str, Match] = {}
        self._layouts: dict[str, Layout] = {}
        self._multiples: dict[str, float] = {}
        self._give_multiples: set[str] = set()
        self._settled: set[str] = set()
        self._remembered: dict[type, list[Mapping[str, str]]] = {}
        self._frames: list[Frame | None] = []
        self._failed: Frame | None = None
        self._following = Following(self._wide, multiples)
        self._failed_classes: set[type] = set()
        self.withholds_multiples = False
        self.confirming = False
        self._first_failure: Mismatch | None = None
        self._dense = {
            name
            for name, module in self._modules.items()
            if is_dense(module)
            and not (module._forward_hooks or module._forward_pre_hooks)
            and f"{name}.weight" not in recording.direct
        }
        self._computes = False
        self._replicas: dict[str, Tensor] = {}

    def run(self, images: Tensor, confirm: Confirmation = "computed") -> WidthPlan:
        """Widen while running.

        Args:
            images: the probe batch that was recorded.
            confirm: whether and how to run once more with what the code itself computes.

        Raises:
            Mismatch: when a module cannot be widened exactly.
        """
        for name, module in self._wide.network.named_modules():
            if is_leaf(module):
                module.register_forward_pre_hook(self._layer_hook(name), with_kwargs=True)
                module.register_forward_hook(self._leave_layer(name))
                if name in self._dense:
                    module.forward = self._dense_layer(name, module.forward)
            elif getattr(module.forward, "__func__", None) is not nn.Module.forward:
                module.forward = self._container(name, module.forward)
        with torch.no_grad(), self, reading(self._wide.network, self._number, self._tensor):
            self._wide.network(images.clone())
            if self._first_failure is not None and not self._wide.plan.tensors:
                raise self._first_failure  # a plan in which nothing widens does not help
            self._wide.drop_idle_attributes()
            if confirm != "none":
                self._computes = confirm == "computed"
                self._confirm(images)
        return self._wide.plan

    def _confirm(self, images: Tensor) -> None:
        """Run the widened network once more with its calls unchanged.

        Raises:
            Mismatch: when the network does not compute what the student computes.
        """
        self.confirming, self._calls, self._frames = True, {}, []
        refresh(self._wide.network)
        self._wide.network(images.clone())

    @contextmanager
    def _running(self, frame: Frame | None) -> Iterator[None]:
        """Mark the code within this context as a container's own, or with None as unobserved."""
        depth = len(self._frames)
        self._frames.append(frame)
        try:
            yield
        finally:
            del self._frames[depth:]  # with the frames of layers that failed

    # Attribute reads

    @own_errors()
    def _number(self, owner: str, name: str, value: Any) -> Any:
        if not self._frames or self._frames[-1] is None or name.startswith("__"):
            return value
        return remember(Attribute(owner, name), value)

    @own_errors()
    def _tensor(self, owner: str, name: str, value: Tensor) -> Tensor:
        full = f"{owner}.{name}" if owner else name
        value = self._wide.read(full, value)
        if self._frames and self._frames[-1] is not None:
            self._following.read(full, value)
        return value

    # Layers

    def _layer_hook(self, name: str) -> Any:
        @own_errors()
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._frames.append(None)
            self._replicas.pop(name, None)
            x = first_tensor(args, kwargs)
            call = self._calls.get(name, 0)
            if self.confirming:
                self._calls[name] = call + 1
            else:
                self._widen_layer(name, x)
            if name in self._dense and x is not None and not self._computes:
                replica = self._replica(name, call, x)
                if replica is not None:
                    self._replicas[name] = replica

        return hook

    def _dense_layer(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            replica = self._replicas.pop(name, None)
            return forward(*args, **kwargs) if replica is None else replica

        return run

    def _replica(self, name: str, call: int, x: Tensor) -> Tensor | None:
        """A dense layer's output: the student's, copied as the layer's index maps say.

        It takes neither wide weights nor products of them.

        Returns:
            The output, or None where it has to be computed: for an input that the index maps do
            not describe.
        """
        inputs = self._recording.inputs.get(name, [])
        outputs = self._recording.layer_outputs.get(name, [])
        if call >= len(outputs):
            return None
        found = self._following.matches.find(inputs[call][0], x)
        weight = self._wide.plan.tensors.get(f"{name}.weight", TensorPlan((None, None)))
        if found is None or found != self._inputs.get(name):
            return None
        axes, _ = found
        channels = x.ndim - self._wide.source(f"{name}.weight").ndim + 1
        map_ = axes[channels]
        if any(axes[channels + 1 :]) or map_ != weight.axes[1]:
            return None
        if map_ is not None and not map_.is_onto():
            return None
        wide = (*axes[:channels], weight.axes[0], *axes[channels + 1 :])
        replica = widen(outputs[call], TensorPlan(wide))
        return replica.mul_(multiple) if (multiple := self._multiples.get(name)) else replica

    def _widen_layer(self, name: str, x: Tensor | None) -> None:
        """Widen a layer by the index maps of its input."""
        # A table's input is row numbers.
        found: Match | None = ((), 1.0) if x is None else self._input(name, x)
        if found is None:
            return
        axes, multiple = found
        if multiple != 1 and name not in self._dense:
            raise UnfitMultiple(name, f"its input is the student's input {times(multiple)}")
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
        if name in self._dense:
            outputs = self._multiples.get(name, 1)
            layer = rescaled(layer, self._modules[name], multiple, outputs)
        self._wide.apply(name, layer, ("weight",) if name in self._dense else ())

    def _leave_layer(self, name: str) -> Any:
        @own_errors()
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._frames.pop()
            self._wide.forget(f"{name}.weight")

        return hook

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call with numbers, constants and weights that fit the copies."""
        frame = self._frames[-1] if self._frames else None
        if frame is None or self.confirming:
            return func(*args, **kwargs)
        with own_errors():
            call = Call(func, args, kwargs)
            if not frame.by_trial:
                call = self._following.prepare(frame, call)
            made = self._direct(call)
        result = made.function(*made.args, **made.kwargs)
        with own_errors():
            self._following.constants.derive((call.args, call.kwargs), result)
        return result

    def _direct(self, call: Call) -> Call:
        """Widen a parameter that a call passes to a linear function; the call with wide weights."""
        args = call.args
        linear = None
        if self._recording.direct:
            linear = linear_call(call.function, args, call.kwargs)
        name = None if linear is None else self._direct_name(linear[1])
        if linear is None or name is None:
            return call
        x, weight, bias = linear
        found = self._input(name, x)
        axes = None if found is None else found[0]
        if found is not None and found[1] != 1:
            raise UnfitMultiple(name, f"its input is the student's input {times(found[1])}")
        owns = bias is not None and self._recording.direct[name] is not None
        if axes is not None:
            inputs = axes[x.ndim - weight.ndim + 1] if weight.ndim > 2 else axes[-1]
            out = None if name in self._kept else self._map(name)
            if inputs is None and any(axes):
                out = None
            tensors = linear_tensors(weight.ndim, owns, out, inputs)
            if out is not None and isinstance(bias, Tensor) and not owns:
                bias = self._computed_bias(name, bias, out)
            if "bias" in tensors:
                tensors[self._recording.direct[name] or ""] = tensors.pop("bias")
            if "weight" in tensors:
                tensors[name] = tensors.pop("weight")
            self._wide.apply("", LayerPlan(tensors))
        named = {"input": x, "weight": self._wide.tensor(name), "bias": bias}
        if owns:
            named["bias"] = self._wide.tensor(self._recording.direct[name] or "")
        rest = {k: v for k, v in call.kwargs.items() if k not in named}
        return Call(call.function, (*named.values(), *args[3:]), rest)

    def _computed_bias(self, name: str, bias: Tensor, out: IndexMap) -> Tensor:
        """Widen a bias that code computes from parameters to the width of the outputs."""
        frame, derived = self._frames[-1], self._recording.biases.get(name)
        names = self._following.constants.names(bias)
        if frame is None or frame.by_trial or derived is None or names is None:
            return bias
        self._following.note_sources(frame, derived, names, 0, out)
        return bias if len(bias) == len(out) else bias[out.tensor]

    def _direct_name(self, weight: Any) -> str | None:
        for name in self._recording.direct:
            if self._wide.is_tensor(weight, name):
                return name
        return None

    def _input(self, name: str, x: Tensor) -> Match | None:
        """The match of a layer's input; None where the layer is planned already."""
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        recorded = self._recording.inputs.get(name, [])
        if call >= len(recorded) or not recorded[call]:
            return None
        found = self._following.matches.input(name, recorded[call][0], x)
        if call == 0:
            self._inputs[name] = found
            return found
        if found != self._inputs[name]:
            raise Mismatch(name, "it is called several times, with inputs that widen differently")
        return None

    def _layout(self, name: str) -> Layout | None:
        size = self._recording.out_channels.get(name)
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

            is_settled = name in self._settled and not self.confirming

            def attempt(by_trial: bool) -> Any:
                events = self._recording.events.get((name, call), ())
                frame = Frame(name, by_trial, events)
                try:
                    if not is_settled and not self.confirming:
                        refresh(self._wide.network.get_submodule(name))
                    with self._running(frame):
                        output = forward(*args, **kwargs)
                    with own_errors():
                        self._following.matches.check_output(
                            name,
                            recorded[call],
                            tensors_in(output),
                            allows_multiples=name in self._give_multiples,
                        )
                except Mismatch:
                    self._failed = frame
                    raise
                except Exception as error:
                    self._failed = frame
                    if is_settled:
                        raise  # as an error of the container whose guess is being tried
                    at_width = "" if self.confirming else "at this width "
                    reason = f"{at_width}its forward does not run ({short_text(error)})"
                    raise Mismatch(name, reason) from error
                if not by_trial and not self.confirming:
                    with own_errors():
                        self._following.settle(frame, self._rule(frame.name))
                return output

            with self._running(None):
                if self.confirming or is_settled:
                    return attempt(by_trial=False)
                arguments = (args, kwargs)
                # All errors are ours, since `attempt` makes a mismatch of each of the network's.
                with own_errors(), self._trials.of_container():
                    return self._try_guesses(
                        name,
                        attempt,
                        lambda: self._maps_in_use(name, call, arguments),
                        lambda: self._layouts_by_cuts(name, call, arguments),
                    )

        return run

    def _try_guesses(
        self,
        name: str,
        attempt: Callable[[bool], Any],
        maps_in_use: Callable[[], MapsInUse],
        layouts_by_cuts: Callable[[], dict[str, Layout]],
    ) -> Any:
        """Run a container with one guess after the other, until one is exact."""
        before = self._state()
        failure: Mismatch | None = None
        is_computed = False
        containers, cls = self._containers_in(name), type(self._modules[name])
        for by_trial in (False, True) if name not in self._by_trial else (True,):
            variables, guesses = self._guesses(name, maps_in_use, solved=not by_trial)
            fails_inside = False
            for guess in guesses:
                if failure is not None and self._trials.are_spent(self._limit(cls, failure)):
                    break
                try:
                    self._apply_guess(variables, guess)
                    output = self._attempt(name, attempt, by_trial)
                    if not name and failure is not None and not self._wide.plan.tensors:
                        raise failure
                except Mismatch as mismatch:
                    failure = failure or mismatch
                    fails_inside = fails_inside or mismatch.name in containers
                else:
                    self._settled.add(name)
                    self._trials.found()
                    self._remember(cls, name, variables, guess)
                    return output
                self._trials.count += 1
                self._restore(before)
                if not is_computed:
                    is_computed = True
                    computed = self._computed_outputs(name, failure, layouts_by_cuts)
                    if any(computed):
                        with suppress(Mismatch):
                            return self._attempt_with(name, attempt, before, *computed)
            if fails_inside or (failure is not None and failure.arithmetic):
                break
        assert failure is not None
        self._failed_classes.add(cls)
        if name and isinstance(failure, UnfitMultiple) and failure.name == name:
            with suppress(Mismatch):
                return self._attempt_with(name, attempt, before, gives_multiples=True)
        return self._keep_narrow(name, attempt, before, failure)

    def _computed_outputs(
        self, name: str, failure: Mismatch, layouts_by_cuts: Callable[[], dict[str, Layout]]
    ) -> tuple[dict[str, Layout], dict[str, float]]:
        """Layouts and multiples of layers' outputs that follow from the way a container failed."""
        if failure.arithmetic:
            return layouts_by_cuts(), {}
        if failure.tensors is None:
            return {}, {}
        prefix = f"{name}." if name else ""
        inside = {n: self._modules[n] for n in self._dense if n.startswith(prefix)}
        return {}, output_multiples(self._recording, inside, self._map, *failure.tensors)

    def _limit(self, cls: type, failure: Mismatch) -> int:
        """The largest number of trials for a container after its first failure."""
        if cls in self._failed_classes:
            return 1
        return _MOST_ARITHMETIC if failure.arithmetic else MOST_TRIALS

    def _guesses(
        self, name: str, maps_in_use: Callable[[], MapsInUse], *, solved: bool
    ) -> tuple[list[Variable], Iterator[Assignment]]:
        """The variables of a container, and the guesses to try, the likeliest first."""
        variables = self._choices.variables(name, maps_in_use, self._layouts, solved=solved)
        remembered = [
            {f"{name}.{local}" if name else local: label for local, label in labels.items()}
            for labels in self._remembered.get(type(self._modules[name]), ())
        ]
        counts = counts_in(variables, self._recording.reads.get(name))
        return variables, assignments(variables, counts, remembered)

    def _attempt(self, name: str, attempt: Callable[[bool], Any], by_trial: bool) -> Any:
        """Run a container, and once more if its code failed before all attributes were solved."""
        before = self._state()
        try:
            return attempt(by_trial)
        except Mismatch as error:
            frame = self._failed
            elsewhere = error.name != name or error.arithmetic
            if by_trial or elsewhere or frame is None or frame.name != name:
                raise
            guessed = self._state()[0]
            self._restore(before)
            if not self._settles(frame):
                self._wide.restore(guessed)
                raise
            self._trials.count += 1
            return attempt(by_trial)

    def _settles(self, frame: Frame) -> bool:
        """Whether the equations noted so far change any attribute or constant of a container."""
        try:
            return self._following.settle(frame, self._rule(frame.name))
        except Mismatch:
            return False

    def _attempt_with(
        self,
        name: str,
        attempt: Callable[[bool], Any],
        before: tuple[Any, ...],
        layouts: Mapping[str, Layout] | None = None,
        multiples: Mapping[str, float] | None = None,
        gives_multiples: bool = False,
    ) -> Any:
        """Run a container with other outputs of its layers.

        Args:
            name: the container.
            attempt: runs the container.
            before: the state to return to on failure.
            layouts: layouts of layers.
            multiples: multiples of copies that outputs of layers have to be.
            gives_multiples: whether the outputs of the container may be multiples of copies.
        """
        self._layouts.update(layouts or {})
        self._multiples.update(multiples or {})
        self._give_multiples.update({name} if gives_multiples else ())
        try:
            output = self._attempt(name, attempt, False)
        except Mismatch:
            self._trials.count += 1
            self._restore(before)
            raise
        self._settled.add(name)
        return output

    def _layouts_by_cuts(self, name: str, call: int, arguments: Any) -> dict[str, Layout]:
        """Layouts of the layers in a container whose outputs it shuffles or cuts unevenly."""
        prefix = f"{name}." if name else ""
        usual = {layer: self._map(layer) for layer in self._recording.out_channels}
        sizes = {
            layer.removeprefix(prefix): size
            if layer in self._kept or (map_ := usual[layer]) is None
            else len(map_)
            for layer, size in self._recording.out_channels.items()
            if layer.startswith(prefix)
        }
        wide = list(tensors_in(arguments))
        recorded = self._recording.inputs.get(name, [])[call]
        found = cut_layouts(
            self._modules[name],
            replace_tensors(
                arguments, {id(w): n.clone() for w, n in zip(wide, recorded, strict=False)}
            ),
            replace_tensors(arguments, {id(w): w.clone() for w in wide}),
            sizes,
        )
        layouts = {prefix + layer: layout for layer, layout in found.items()}
        other = any(layout_map(layout, self._scale) != usual[n] for n, layout in layouts.items())
        return layouts if other else {}

    def _keep_narrow(
        self,
        name: str,
        attempt: Callable[[bool], Any],
        before: tuple[Any, ...],
        failure: Mismatch,
    ) -> Any:
        """The last resort: keep layers inside the container narrow.

        Raises:
            Mismatch: the given failure, where narrow layers do not help either.
        """
        if failure.tensors is not None and self._following.matches.withholds(*failure.tensors):
            self.withholds_multiples = True
        if failure.name in self._containers_in(name) or isinstance(failure, UnfitMultiple):
            narrow = stream_layers(self._recording, name, self._modules[name])
        else:
            narrow = inner_layers(self._recording, name)
        if not name or not narrow:
            raise failure
        where = "" if failure.name == name else f"in {failure.name}, "
        self._wide.plan.narrow[name] = f"{where}{failure.reason}"
        try:
            output = self._attempt_with(name, attempt, before, narrow)
        except Mismatch:
            raise failure from None
        self._first_failure = self._first_failure or failure
        return output

    def _maps_in_use(self, name: str, call: int, arguments: Any) -> MapsInUse:
        """Index maps in use for each axis size in a container, and sizes of inputs that stay."""
        known: dict[int, list[IndexMap]] = {}

        def add(map_: IndexMap | None) -> None:
            if map_ is not None and map_ not in known.setdefault(map_.narrow, []):
                known[map_.narrow].append(map_)

        fixed: set[int] = set()
        recorded = self._recording.inputs.get(name, [])[call]
        for narrow, wide in zip(recorded, tensors_in(arguments), strict=False):
            axes = self._following.matches.axes(name, narrow, wide)
            for size, map_ in zip(narrow.shape, axes, strict=True):
                add(map_)
                fixed.update({size} if map_ is None else ())
        prefix = f"{name}." if name else ""
        for layer, size in self._recording.out_channels.items():
            if layer.startswith(prefix) and layer not in self._kept and size > 1:
                add(layout_map((Segment(size),), self._scale))
        return known, fixed

    def _apply_guess(self, variables: Sequence[Variable], guess: Assignment) -> None:
        for variable, label in zip(variables, guess, strict=True):
            value = variable.options[label]
            owner, _, local = variable.names[0].rpartition(".")
            if variable.kind == "layout":
                if label != "plain":  # otherwise containers further inside decide the layout
                    self._layouts.update(dict.fromkeys(variable.names, value))
            elif value is not None and variable.kind == "number":
                self._wide.apply(owner, LayerPlan(attributes={local: value}))
            elif value is not None:
                self._wide.apply(owner, LayerPlan({local: value}))

    def _remember(
        self, cls: type, name: str, variables: Sequence[Variable], guess: Assignment
    ) -> None:
        prefix = f"{name}." if name else ""
        labels = {v.names[0].removeprefix(prefix): g for v, g in zip(variables, guess, strict=True)}
        known = self._remembered.setdefault(cls, [])
        if labels not in known:
            known.insert(0, labels)

    # State

    def _state(self) -> tuple[Any, ...]:
        tracked = (
            *(self._calls, self._inputs, self._settled),
            *(self._layouts, self._multiples, self._give_multiples),
        )
        return (self._wide.state(), *(copy.copy(value) for value in tracked))

    def _restore(self, state: tuple[Any, ...]) -> None:
        wide, *tracked = state
        self._wide.restore(wide)
        calls, inputs, settled, *outputs = map(copy.copy, tracked)
        self._calls, self._inputs, self._settled = calls, inputs, settled
        self._layouts, self._multiples, self._give_multiples = outputs

    def _layers(self) -> list[str]:
        leaves = [name for name, module in self._modules.items() if is_leaf(module)]
        return [*leaves, *self._recording.direct]

    def _containers_in(self, name: str) -> set[str]:
        prefix = f"{name}." if name else ""
        return {c for c in self._recording.outputs if c.startswith(prefix) and c != name}

    def _rule(self, name: str) -> Rule:
        return rule_for(self._modules[name])


def title(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Name and class of a module, or of the module that owns a weight, for messages."""
    if name not in modules:
        name = name.rpartition(".")[0]
    return f"{name or 'the network'} ({type(modules[name]).__name__})"
