"""Widen each layer just before it runs, by the index maps of its input.

The channels of the layer's wide input are matched by value with those of the student's recorded
input. The match gives the index maps, whatever concatenations, shuffles or transpositions the
input has gone through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gpd_cli.widening.layers import (
    LayerPlan,
    UnsupportedLayerError,
    linear_tensors,
    plan_layer,
    rescaled,
)
from gpd_cli.widening.match import Match
from gpd_cli.widening.mismatch import Mismatch, UnfitMultiple, times
from gpd_cli.widening.numbers.calls import Call
from gpd_cli.widening.plan import Axes, IndexMap, TensorPlan
from gpd_cli.widening.running.own_errors import own_errors
from gpd_cli.widening.running.tracing import first_tensor, linear_call
from gpd_cli.widening.search.widening_run import WideningRun
from gpd_cli.widening.tensors import replicate


class LayerWidening:
    """Widens the layers of a run: leaf modules, and weights that code passes to linear functions.

    Args:
        run: the shared data of the run.

    Attributes:
        computes: whether dense layers compute their outputs from their wide weights. Otherwise
            copies of the student's outputs are used, which takes less time and no wide weights.
    """

    def __init__(self, run: WideningRun) -> None:
        self._run = run
        self.computes = False
        self._replicas: dict[str, Tensor] = {}

    def observe(self, name: str, leaf: nn.Module) -> None:
        """Prepare a leaf of the wide network, so that it widens just before it runs.

        Args:
            name: name of the leaf.
            leaf: the leaf, which gets hooks, and another forward if it is a dense layer.
        """
        leaf.register_forward_pre_hook(self._enter(name), with_kwargs=True)
        leaf.register_forward_hook(self._leave(name))
        if name in self._run.dense:
            leaf.forward = self._replicating(name, leaf.forward)

    def _enter(self, name: str) -> Any:
        @own_errors()
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            run = self._run
            run.frames.append(None)
            self._replicas.pop(name, None)
            x = first_tensor(args, kwargs)
            call = run.state.calls.get(name, 0)
            if run.is_confirming:
                run.state.count_call(name)
            else:
                self._widen(name, x)
            if name in run.dense and x is not None and not self.computes:
                replica = self._replica(name, call, x)
                if replica is not None:
                    self._replicas[name] = replica

        return hook

    def _leave(self, name: str) -> Any:
        @own_errors()
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._run.frames.pop()
            self._run.wide.forget(f"{name}.weight")

        return hook

    def _replicating(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a layer's forward, so that it returns the replicated output where there is one."""

        def run(*args: Any, **kwargs: Any) -> Any:
            replica = self._replicas.pop(name, None)
            return forward(*args, **kwargs) if replica is None else replica

        return run

    def _replica(self, name: str, call: int, x: Tensor) -> Tensor | None:
        """Make a dense layer's output by copying the student's output.

        This needs neither wide weights nor products with them.

        Args:
            name: name of the layer.
            call: number of the layer's call, from 0.
            x: the layer's wide input.

        Returns:
            The output; None if it has to be computed, since the input does not have the index maps
            that the layer was widened by.
        """
        run = self._run
        inputs = run.recording.inputs.get(name, [])
        outputs = run.recording.layer_outputs.get(name, [])
        if call >= len(outputs):
            return None
        found = run.following.matches.find(inputs[call][0], x)
        weight = run.wide.plan.tensors.get(f"{name}.weight", TensorPlan((None, None)))
        if found is None or found != run.state.inputs.get(name):
            return None
        axes, _ = found
        channels = x.ndim - run.wide.source(f"{name}.weight").ndim + 1
        map_ = axes[channels]
        if any(axes[channels + 1 :]) or map_ != weight.axes[1]:
            return None
        if map_ is not None and not map_.is_onto():
            return None
        wide = (*axes[:channels], weight.axes[0], *axes[channels + 1 :])
        replica = replicate(outputs[call], TensorPlan(wide))
        factor = run.state.output_factors.get(name)
        return replica.mul_(factor) if factor else replica

    def _widen(self, name: str, x: Tensor | None) -> None:
        """Widen a leaf by the index maps of its input."""
        run = self._run
        # Without a floating-point input the layer is a table, whose input is row numbers.
        found = Match((), 1.0) if x is None else self._input(name, x)
        if found is None:
            return
        axes, factor = found
        is_dense = name in run.dense
        if not is_dense:
            _check_replication(name, factor)
        try:
            layer = plan_layer(
                run.modules[name],
                axes,
                run.scale,
                keep_output=name in run.keeps_output,
                layout=run.layout(name),
            )
        except UnsupportedLayerError as error:
            raise Mismatch(name, str(error)) from error
        if is_dense:
            output_factor = run.state.output_factors.get(name, 1)
            layer = rescaled(layer, run.modules[name], factor, output_factor)
        run.wide.apply(name, layer, ("weight",) if is_dense else ())

    def _input(self, name: str, x: Tensor) -> Match | None:
        """Match a layer's input with the recorded one; None if the layer has widened already."""
        run = self._run
        call = run.state.count_call(name)
        recorded = run.recording.inputs.get(name, [])
        if call >= len(recorded) or not recorded[call]:
            return None
        found = run.following.matches.input(name, recorded[call][0], x)
        if call == 0:
            run.state.inputs[name] = found
            return found
        if found != run.state.inputs[name]:
            raise Mismatch(name, "it is called several times, with inputs that widen differently")
        return None

    def direct(self, call: Call) -> Call:
        """Widen a weight that a container's code passes to a linear function.

        Args:
            call: any call in the code.

        Returns:
            The call with the wide weight and bias; the same call if it passes no such weight.

        Raises:
            Mismatch: when the weight cannot widen by the index maps of the call's input.
        """
        run = self._run
        linear = None
        if run.recording.direct:
            linear = linear_call(call.function, call.args, call.kwargs)
        name = None if linear is None else self._direct_name(linear[1])
        if linear is None or name is None:
            return call
        x, weight, bias = linear
        own_bias = None if bias is None else run.recording.direct[name]
        found = self._input(name, x)
        if found is not None:
            axes, factor = found
            _check_replication(name, factor)
            out = self._widen_direct(name, axes, weight.ndim, own_bias)
            if out is not None and isinstance(bias, Tensor) and own_bias is None:
                bias = self._computed_bias(name, bias, out)
        if own_bias is not None:
            bias = run.wide.tensor(own_bias)
        named = {"input": x, "weight": run.wide.tensor(name), "bias": bias}
        rest = {k: v for k, v in call.kwargs.items() if k not in named}
        return Call(call.function, (*named.values(), *call.args[3:]), rest)

    def _direct_name(self, weight: Any) -> str | None:
        for name in self._run.recording.direct:
            if self._run.wide.is_tensor(weight, name):
                return name
        return None

    def _widen_direct(
        self, name: str, axes: Axes, ndim: int, own_bias: str | None
    ) -> IndexMap | None:
        """Widen a direct weight and its bias.

        Args:
            name: name of the weight.
            axes: index maps of the input.
            ndim: number of axes of the weight.
            own_bias: name of the bias if it is a parameter, else None.

        Returns:
            The index map of the outputs.
        """
        inputs = axes[1 - ndim]
        out = None if name in self._run.keeps_output else self._run.output_map(name)
        if inputs is None and any(axes):
            out = None
        plans = linear_tensors(ndim, own_bias is not None, out, inputs)
        full = {"weight": name, "bias": own_bias or ""}
        self._run.wide.apply("", LayerPlan({full[local]: plan for local, plan in plans.items()}))
        return out

    def _computed_bias(self, name: str, bias: Tensor, out: IndexMap) -> Tensor:
        """Widen a bias that code computes from parameters, and note these parameters' index maps.

        Args:
            name: name of the weight that is passed with the bias.
            bias: the bias, ``[out]``, narrow or wide.
            out: index map of the outputs.
        """
        following, derived = self._run.following, self._run.recording.biases.get(name)
        frame, names = self._run.frame, following.constants.names(bias)
        if frame is None or frame.is_guessed or derived is None or names is None:
            return bias
        following.note_sources(frame, derived, names, 0, out)
        return bias if len(bias) == len(out) else bias[out.tensor]


def _check_replication(name: str, factor: float) -> None:
    """Check that a layer's input consists of plain copies, for layers that cannot divide it.

    Args:
        name: name of the layer.
        factor: the number that the copies in the input are multiplied by.

    Raises:
        UnfitMultiple: when this number is not 1.
    """
    if factor != 1:
        raise UnfitMultiple(name, f"its input is the student's input {times(factor)}")
