"""Find a network's width plan by running the network: first as it is, then as it is widened."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from gpd_cli.errors import ExpansionError, short_text
from gpd_cli.widening.layers import is_leaf
from gpd_cli.widening.layout import Scale
from gpd_cli.widening.mismatch import Mismatch
from gpd_cli.widening.names import split_name, title
from gpd_cli.widening.observe.record import record
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.rules import check_rules
from gpd_cli.widening.running.converting import converted
from gpd_cli.widening.running.copying import copy_network
from gpd_cli.widening.running.detect_checkpointing import runs_again
from gpd_cli.widening.running.double import in_double
from gpd_cli.widening.running.locate import located
from gpd_cli.widening.running.own_errors import ForwardError, forward_errors, original_errors
from gpd_cli.widening.running.randomize import calibrate, randomize
from gpd_cli.widening.running.refresh import refresh
from gpd_cli.widening.search.trials import Trials
from gpd_cli.widening.search.unsupported import check_student
from gpd_cli.widening.search.widen import Confirmation, Widening
from gpd_cli.widening.search.widening_run import WideningRun

_SEED = 20410
_BATCH = 2
_GIB = 2**30
_BYTES = 8  # bytes of a float64 number
_SMALL = (96, 128)  # sides of images to try first, since smaller images take less time


def find_plan(
    student: nn.Module,
    sample: Tensor,
    ratio: float,
    *,
    exclude: Sequence[str] = (),
    width_multiple: int = 1,
    shrink: bool = True,
    is_certified: bool = False,
) -> WidthPlan:
    """Find which tensors of a network widen, and by which index maps.

    Args:
        student: the network; only a copy of it is changed.
        sample: a batch of images, ``[B, C, H, W]``; only the shape matters.
        ratio: the expansion ratio, 1 or more.
        exclude: patterns of names of layers that keep their output channels.
        width_multiple: wide numbers of channels are rounded up to a multiple of this number.
        shrink: whether to search with smaller images where the network takes them. This is faster,
            and index maps do not depend on the size of the images.
        is_certified: whether the caller certifies the expansion. If so, the run of the wide network
            that confirms the plan computes no wide weights, but copies the student's activations.

    Returns:
        The plan; an empty plan at ratio 1.

    Raises:
        ExpansionError: when the network does not run on the sample, or a module cannot be widened
            exactly; the message names the module and the remedy.
    """
    if not isinstance(ratio, int | float) or not math.isfinite(ratio) or ratio < 1:
        raise ExpansionError(f"The expansion ratio must be 1 or more, not {ratio}.")
    if not isinstance(width_multiple, int) or width_multiple < 1:
        raise ExpansionError(f"The width multiple must be 1 or more, not {width_multiple}.")
    _check_memory(student, ratio, width_multiple)
    check_student(student)
    check_rules(student)
    generator = torch.Generator().manual_seed(_SEED)
    _refresh(student)
    copy = converted(copy_network(student), "cpu", torch.float64).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    randomize(copy, generator)
    scale = Scale(ratio, width_multiple)
    whole = torch.Size((min(_BATCH, len(sample)), *sample.shape[1:]))
    trials = Trials()
    try:
        with torch.random.fork_rng(devices=[]), in_double(), original_errors():
            # A plan that the caller certifies is confirmed as well: if the numbers that the
            # network's code computes prove wrong, larger images can still be tried; and a
            # certificate does not see what a student multiplies by zero (a new head, a residual
            # path that starts at zero). Copied outputs suffice, so no wide weights are computed.
            confirm: Confirmation = "copied" if is_certified else "computed"
            for shape in [*_smaller(whole)] if shrink else []:
                images = torch.randn(shape, generator=generator, dtype=torch.float64)
                try:
                    return _plan(copy, images, scale, exclude, confirm, trials)
                except ExpansionError:
                    # These images are too small for the network, or images of the full size will
                    # raise the same error.
                    continue
            images = torch.randn(whole, generator=generator, dtype=torch.float64)
            return _plan(copy, images, scale, exclude, confirm, trials)
    except _NotRunError as error:
        if not _runs(student, whole):
            raise
        raise ExpansionError(
            f"{type(student).__name__} runs on a sample of shape {list(whole)}, but not as gpd has "
            f"to run it, in float64 and observed ({error.why}); register tensors as buffers "
            "(register_buffer), keep layers in an nn.ModuleList, and let the code take subclasses "
            "of numbers."
        ) from error
    finally:
        gc.collect()  # hooks and networks refer to each other, and hold large tensors


def _check_memory(student: nn.Module, ratio: float, width_multiple: int) -> None:
    """Refuse, before the search, a dynamic teacher that needs more than twice the machine's memory.

    Args:
        student: the student.
        ratio: the expansion ratio.
        width_multiple: wide numbers of channels are rounded up to a multiple of this number.

    Raises:
        ExpansionError: when the teacher's weights would need so much memory.
    """

    def widened(size: int) -> float:
        # Axes of size 1, as in depthwise kernels, often keep their size.
        return size if size == 1 else math.ceil(size * ratio / width_multiple) * width_multiple

    elements = sum(
        math.prod([*map(widened, shape[:2]), *shape[2:]])
        for shape in (parameter.shape for parameter in student.parameters())
        if len(shape) > 1
    )
    needed, available = elements * _BYTES, _memory()
    if needed > 2 * available:
        raise ExpansionError(
            f"At ratio {ratio:g} and in multiples of {width_multiple} channels the dynamic teacher "
            f"would take about {needed / _GIB:,.0f} GiB, but this machine has "
            f"{available / _GIB:,.0f} GiB; lower --model.ratio or --model.width_multiple."
        )


def _memory() -> float:
    """The machine's memory in bytes; infinity where the system does not tell it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


def _smaller(shape: torch.Size) -> Iterator[torch.Size]:
    """Shapes of batches with smaller images, the smallest first.

    Args:
        shape: shape of the probe batch. If it is not ``[B, C, H, W]``, there are no smaller shapes.
    """
    if len(shape) == 4:
        for side in _SMALL:
            if side < min(shape[2:]):
                yield torch.Size((*shape[:2], side, side))


def _plan(
    student: nn.Module,
    images: Tensor,
    scale: Scale,
    exclude: Sequence[str],
    confirm: Confirmation,
    trials: Trials,
) -> WidthPlan:
    """Find the plan with a given probe batch.

    Args:
        student: a copy of the student in float64, with random weights.
        images: the probe batch, ``[B, C, H, W]``.
        scale: how much wider the network gets.
        exclude: patterns of names of layers that keep their output channels.
        confirm: how a run of the widened network confirms the plan.
        trials: the counter of trials.

    Raises:
        ExpansionError: when the network does not run on the images, cannot be widened exactly, or
            has nothing to widen.
    """
    recording, training = _record(student, images), _run_in_training(student, images)
    again = recording.runs_again or training.runs_again
    if scale.ratio == 1:
        return WidthPlan(scale.ratio, runs_again=again)
    for layer in training.layers:
        if layer not in recording.inputs:
            raise ExpansionError(
                f"{title(layer, student.get_submodule(layer))} runs in train mode only, so that "
                "its expansion cannot be checked in eval mode; build the network without it."
            )
    plan = _widen(student, recording, scale, exclude, images, confirm, trials)
    plan.trials, plan.runs_again = trials.count, again
    if not plan.tensors:
        reason, remedy = "its layers give the output directly", "set the ratio to 1"
        if not any(
            scale.width(p.shape[1]) > p.shape[1] for p in student.parameters() if p.ndim > 1
        ):
            reason = f"ratio {scale.ratio:g} adds less than one channel to each of its layers"
            remedy = "raise the ratio"
        elif exclude:
            reason = "every layer is excluded"
        raise ExpansionError(
            f"Nothing in {type(student).__name__} can be widened, since {reason}; {remedy}."
        )
    return plan


def _widen(
    student: nn.Module,
    recording: Recording,
    scale: Scale,
    exclude: Sequence[str],
    images: Tensor,
    confirm: Confirmation,
    trials: Trials,
) -> WidthPlan:
    """Find the plan, first with activations that are plain copies, then with multiples of copies.

    A wrong guess may lead to a multiple of copies, too, such as a query times the root of a wrong
    width. So multiples are allowed only if there is no plan without them, or if that plan keeps
    something narrow.

    Args:
        student: a copy of the student in float64, with random weights.
        recording: the student's run on the probe batch.
        scale: how much wider the network gets.
        exclude: patterns of names of layers that keep their output channels.
        images: the probe batch, ``[B, C, H, W]``.
        confirm: how a run of the widened network confirms the plan.
        trials: the counter of trials.

    Raises:
        ExpansionError: when no plan is found.
    """
    layers = [name for name, module in student.named_modules() if is_leaf(module)]
    keeps_output = recording.keeps_output | _excluded([*layers, *recording.direct], exclude)

    def widened(allows_multiples: bool) -> tuple[WidthPlan | Mismatch, Widening]:
        """Run a widening, and return the plan (or the mismatch if there is none) and the widening.

        Args:
            allows_multiples: whether activations may be multiples of copies.
        """
        # Containers whose solved numbers the confirming run has shown to be wrong.
        guessed: set[str] = set()
        while True:
            run = WideningRun(student, recording, scale, keeps_output, allows_multiples, trials)
            widening = Widening(run, guessed)
            try:
                return widening.widen(images, confirm), widening
            except Mismatch as failure:
                if not widening.is_confirming or failure.name in guessed:
                    return failure, widening
                guessed.add(failure.name)

    found, first = widened(allows_multiples=False)
    if first.multiples_might_help:
        other, _ = widened(allows_multiples=True)
        if isinstance(found, Mismatch) or (
            isinstance(other, WidthPlan) and len(other.kept_narrow) <= len(found.kept_narrow)
        ):
            found = other
    if isinstance(found, WidthPlan):
        return found
    modules, name = dict(student.named_modules()), found.name
    if name not in modules:
        name, _ = split_name(name)  # the module that owns a direct weight
    raise ExpansionError(
        f"{title(name, modules[name])} cannot be widened: {found.reason}; keep the layers that "
        "feed it narrow (--model.exclude), choose another ratio, or add a rule for its class "
        "(RULES)."
    ) from found


def _excluded(layers: Sequence[str], patterns: str | Sequence[str]) -> set[str]:
    """Names of the layers that a user excludes from widening.

    Args:
        layers: names of all layers.
        patterns: patterns of layer names, or names of modules that are excluded as a whole.

    Raises:
        ExpansionError: when a pattern matches no layer.
    """
    excluded = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {
            layer
            for layer in layers
            if fnmatchcase(layer, pattern) or layer.startswith(f"{pattern}.")
        }
        if not found:
            raise ExpansionError(
                f"No layer is named '{pattern}'; set --model.exclude to patterns of layer names, "
                f"such as '{layers[0] if layers else 'layer4.*'}'."
            )
        excluded |= found
    return excluded


class _NotRunError(ExpansionError):
    """The copy of a student in float64 does not run.

    Args:
        message: the error message.
        why: the module and the error, as a part of a sentence.
    """

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def _runs(student: nn.Module, shape: torch.Size) -> bool:
    """Whether a student runs by itself, in its own type and on its own device.

    Args:
        student: the student.
        shape: shape of the images to run it on, ``[B, C, H, W]``.
    """
    tensors = [*student.parameters(), *student.buffers()]
    weight = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), suppress(Exception):
        images = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        copy_network(student).eval()(images)
        return True
    return False


def _record(student: nn.Module, images: Tensor) -> Recording:
    """Calibrate the student's statistics, and record its run on the probe batch.

    Args:
        student: a copy of the student in float64, with random weights.
        images: the probe batch, ``[B, C, H, W]``.

    Raises:
        ExpansionError: when the network does not run on the images, or returns no logits.
    """
    with located(student) as where:
        try:
            # The first run is not recorded: code may compute something in it that it then keeps
            # (ConViT's positions).
            with torch.no_grad(), forward_errors():
                student(images.clone())
            _refresh(student)
            calibrate(student, images.clone(), torch.Generator().manual_seed(_SEED))
            recording = record(student, images.clone())
        except ForwardError as failure:
            why = f"{where()}: {short_text(failure.error)}"
            raise _NotRunError(
                f"{type(student).__name__} does not run on a sample of shape {list(images.shape)} "
                f"({why}); pass a sample of the shape that the network takes.",
                why,
            ) from failure.error
    _refresh(student)
    if recording.output is None or recording.output.ndim < 2:
        raise ExpansionError(
            f"{type(student).__name__} does not return a batch of logits that depends on its "
            "input; pass a network that returns one tensor, [B, classes]."
        )
    return recording


def _refresh(network: nn.Module) -> None:
    """Empty the caches that a network's modules keep in eval mode.

    Raises:
        ExpansionError: when the network's own ``train()`` does not run.
    """
    try:
        with forward_errors():
            refresh(network)
    except ForwardError as failure:
        raise ExpansionError(
            f"The train() of {type(network).__name__}, which gpd calls to empty caches, does not "
            f"run ({short_text(failure.error)}); correct this train()."
        ) from failure.error


@dataclass(frozen=True)
class _TrainingRun:
    """What a run of the student in train mode has shown.

    Args:
        layers: names of the layers that ran, in the order of the run.
        runs_again: whether the backward pass runs parts of the network again (gradient
            checkpointing).
    """

    layers: Sequence[str]
    runs_again: bool


def _run_in_training(student: nn.Module, images: Tensor) -> _TrainingRun:
    """Run a copy of the student in train mode, to see which layers run.

    Args:
        student: a copy of the student in float64, with random weights.
        images: the probe batch, ``[B, C, H, W]``.

    Raises:
        ExpansionError: when a part would run again in a backward pass of its own.
    """
    layers: list[str] = []
    network = copy_network(student, student.parameters()).train()
    for name, module in network.named_modules():
        if is_leaf(module):
            module.register_forward_pre_hook(lambda m, args, name=name: layers.append(name))
    output = None
    # Only the calls matter, and not errors, such as for batch statistics of a single pixel.
    with suppress(Exception):
        output = network(images.clone())
    return _TrainingRun(layers, runs_again(network, output))
