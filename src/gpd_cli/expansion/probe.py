"""Find a network's width plan by running it.

The narrow network runs once on random images, with random weights, and every layer's input is
recorded. Then a copy runs, and just before each layer of it runs, that layer is widened: the
channels of its actual input, matched by value with the recorded ones, say which wide channel
copies which narrow one, through whatever concatenation, split, shuffle or transposition.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.errors import ExpansionError
from gpd_cli.expansion.compare import relative_difference
from gpd_cli.expansion.containers import (
    container_attributes,
    container_tensors,
    head_count,
    head_layout,
)
from gpd_cli.expansion.layers import LayerPlan, UnsupportedLayerError, is_leaf, plan_layer
from gpd_cli.expansion.locate import located, short_text
from gpd_cli.expansion.match import match_axes
from gpd_cli.expansion.plan import WidthPlan
from gpd_cli.expansion.randomize import randomize
from gpd_cli.expansion.record import InjectiveActivations, Recording, first_tensor, record
from gpd_cli.expansion.teacher import widen_module

_SEED = 20410


def find_plan(student: nn.Module, sample: Tensor, ratio: float) -> WidthPlan:
    """Find which tensors of a network widen, and how.

    Args:
        student: the network; it is copied, not touched.
        sample: a batch of the shape the network takes, ``[B, C, H, W]``; only its shape matters.
        ratio: the expansion ratio, 1 or more.

    Returns:
        The plan; for ratio 1 an empty one.

    Raises:
        ExpansionError: when the network does not run on the sample, or a module cannot be widened
            exactly; the message names the module and the remedy.
    """
    if not isinstance(ratio, int | float) or not math.isfinite(ratio) or ratio < 1:
        raise ExpansionError(f"The expansion ratio must be 1 or more, not {ratio}.")
    generator = torch.Generator().manual_seed(_SEED)
    narrow = copy.deepcopy(student).to("cpu", torch.float64).eval().requires_grad_(True)
    randomize(narrow, generator)
    images = torch.randn(sample.shape, generator=generator, dtype=torch.float64)
    attention = [name for name, m in narrow.named_modules() if head_count(m) and not is_leaf(m)]
    with torch.random.fork_rng(devices=[]), located(narrow) as where:
        try:
            recording = record(narrow, images.clone(), attention)
        except Exception as error:
            raise ExpansionError(
                f"{type(student).__name__} does not run on a sample of shape "
                f"{list(sample.shape)} ({where()}: {short_text(error)}); pass a sample of the "
                "shape that the network takes."
            ) from error
    if recording.output is None or recording.output.ndim < 2:
        raise ExpansionError(
            f"{type(student).__name__} returns no batch of logits that depends on its input; pass "
            "a network that returns one tensor, [B, classes]."
        )
    if ratio == 1:
        return WidthPlan(ratio)
    overlooked = _runs_in_training_only(narrow, images, recording.called)
    if overlooked:
        raise ExpansionError(
            f"{overlooked} ({type(narrow.get_submodule(overlooked)).__name__}) runs in train mode "
            "only, where no student can be compared with its teacher; build the network without it."
        )
    return _Widening(narrow, recording, ratio).run(images)


class _Widening:
    """One run of the copy that is widened layer by layer."""

    def __init__(self, narrow: nn.Module, recording: Recording, ratio: float) -> None:
        self.narrow = dict(narrow.named_modules())
        self.wide = copy.deepcopy(narrow)
        self.recording = recording
        self.ratio = ratio
        self.plan = WidthPlan(ratio)
        self.calls: dict[str, int] = {}
        self.found: dict[str, tuple[Any, ...]] = {}

    def run(self, images: Tensor) -> WidthPlan:
        handles = [
            module.register_forward_pre_hook(
                self._leaf_hook(name) if is_leaf(module) else self._container_hook(name),
                with_kwargs=True,
            )
            for name, module in self.wide.named_modules()
        ]
        handles += [
            self.wide.get_submodule(name).register_forward_hook(self._result_hook(name))
            for name in self.recording.results
        ]
        with torch.random.fork_rng(devices=[]), located(self.wide) as where:
            try:
                with torch.no_grad(), InjectiveActivations():
                    output = first_tensor((self.wide(images.clone()),), {})
            except ExpansionError:
                raise
            except Exception as error:
                raise ExpansionError(
                    f"{where()} does not run at ratio {self.ratio} ({short_text(error)}); its "
                    "forward relies on a width that the expansion does not know of."
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
        expected = self.recording.output
        if (
            output is None
            or expected is None
            or output.shape != expected.shape
            or relative_difference(output, expected) > 1e-8
        ):
            raise ExpansionError(
                f"{type(self.narrow['']).__name__} cannot be expanded exactly: the wide network's "
                "output differs from the student's although every layer's input is a replication "
                "of the student's; the operations after its last layers mix channels."
            )
        return self.plan

    def _leaf_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = self.calls[name] = self.calls.get(name, -1) + 1
            x, recorded = first_tensor(args, kwargs), self.recording.inputs.get(name, [])
            if x is None or call >= len(recorded):
                return
            axes = match_axes(recorded[call], x)
            if axes is None:
                raise ExpansionError(
                    f"{self._title(name)} cannot be widened: its input is not a replication of the "
                    "student's input, because something before it mixes channels by position."
                )
            if call:
                if axes != self.found[name]:
                    raise ExpansionError(
                        f"{self._title(name)} cannot be widened: it is called several times, with "
                        "inputs that widen differently."
                    )
                return
            self.found[name] = axes
            try:
                layer = plan_layer(
                    self.narrow[name],
                    axes,
                    self.ratio,
                    keep_output=name in self.recording.kept,
                    heads=self._heads(name),
                )
            except UnsupportedLayerError as error:
                raise ExpansionError(f"{self._title(name)} cannot be widened: {error}.") from error
            self._apply(name, layer)

        return hook

    def _result_hook(self, name: str) -> Any:
        """Layers of a kind that is not known are trusted only as far as they can be checked."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            y, recorded = first_tensor((output,), {}), self.recording.results.get(name, [])
            call = self.calls.get(name, 0)
            if y is None or call >= len(recorded):
                return
            if match_axes(recorded[call], y) is None:
                raise ExpansionError(
                    f"{self._title(name)} cannot be widened: it is of a kind that is not known, "
                    "and its output does not follow the copies in its input; build it from "
                    "layers of torch.nn."
                )

        return hook

    def _container_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in self.calls:
                return
            self.calls[name] = 0
            narrow = self.narrow[name]
            widths = self._widths(name)
            if widths:
                layer = LayerPlan(
                    container_tensors(narrow, widths, self.ratio),
                    container_attributes(narrow, self.ratio),
                )
                self._apply(name, layer)

        return hook

    def _apply(self, name: str, layer: LayerPlan) -> None:
        prefix = f"{name}." if name else ""
        step = WidthPlan(self.ratio)
        step.tensors = {prefix + local: plan for local, plan in layer.tensors.items()}
        if layer.attributes:
            step.attributes[name] = layer.attributes
        widen_module(self.wide, step)
        self.plan.tensors.update(step.tensors)
        self.plan.attributes.update(step.attributes)

    def _heads(self, name: str) -> Any:
        """The head layout that a layer's output feeds, if it is inside an attention container."""
        parent = name.rpartition(".")[0]
        ends = self.recording.ends.get(parent)
        if ends is None or name in ends:
            return None
        # Where a block holds attention and MLP as one, the narrower of its last layers is
        # attention's, which takes all heads side by side.
        last = [self.narrow[end] for end in ends if end.rpartition(".")[0] == parent]
        widths = [m.in_features for m in last if isinstance(m, nn.Linear)]
        return head_layout(self.narrow[parent], min(widths, default=None))

    def _widths(self, name: str) -> set[int]:
        """The channel counts that widen inside a container."""
        prefix = f"{name}." if name else ""
        widths: set[int] = set()
        for leaf in self.recording.inputs:
            if not leaf.startswith(prefix) or leaf in self.recording.kept:
                continue
            module = self.narrow[leaf]
            for attribute in ("out_features", "out_channels", "embed_dim"):
                size = getattr(module, attribute, None)
                if isinstance(size, int):
                    widths.add(size)
        return widths

    def _title(self, name: str) -> str:
        return f"{name or 'the network'} ({type(self.narrow[name]).__name__})"


def _runs_in_training_only(network: nn.Module, images: Tensor, known: set[str]) -> str | None:
    """The name of a layer that runs in train mode and not in eval mode, if there is one."""
    called: list[str] = []
    network = copy.deepcopy(network).train()
    for name, module in network.named_modules():
        if is_leaf(module) and name not in known:
            module.register_forward_pre_hook(lambda m, args, name=name: called.append(name))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network(images.clone())
    except Exception:
        pass  # statistics of a single pixel, say: what matters is which layers ran
    return called[0] if called else None
