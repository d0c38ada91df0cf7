"""Check, right after expansion, that the dynamic teacher computes the student's function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpd_cli.errors import ExpansionError, short_text
from gpd_cli.generators import GeneratorStates
from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.teacher.kernel import ExactSharing, SharedKernel
from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.running.double import in_double
from gpd_cli.widening.running.refresh import refresh

TOLERANCE = 1e-9
"""Largest relative difference of the logits, in float64, at which both networks count as equal."""

# Largest relative difference in train mode. Statistics of a small batch amplify rounding errors,
# but not up to 1e-6.
_TRAINING_TOLERANCE = 1e-6

_ROUNDING = 1e-15  # some units in the last place of float64
# Relative changes of the images by _ROUNDING change the logits by less than this, unless the
# network amplifies rounding errors from layer to layer.
_MOST_RESPONSE = 1e-12


class InexactError(ExpansionError):
    """A network cannot be expanded exactly: its teacher differs by more than rounding explains."""


def certify(pair: Pair, sample: Tensor) -> Certificate:
    """Compare the logits of both networks, in float64, on random images.

    Args:
        pair: student and dynamic teacher. If any of its branches has a gate that is not zero, the
            pair has to be in float64. Its state and its mode are restored afterwards.
        sample: a batch, ``[B, C, H, W]``; the random images have the same shape.

    Returns:
        The certificate.

    Raises:
        InexactError: when the relative difference exceeds `TOLERANCE`, and not by rounding alone.
        ExpansionError: when the difference cannot be told from rounding, when both networks differ
            in train mode only, when the student changes its images or gives no finite logits, or
            when the teacher does not run.
    """
    generator = torch.Generator().manual_seed(sample.shape[0])
    images = torch.randn(sample.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), in_double(), _as_before(pair):
        given = images.clone()
        student = pair.eval().student(images)
        _check_unchanged(pair, images, given)
        if not bool(torch.isfinite(student).all()):
            raise ExpansionError(
                f"{type(pair.narrow).__name__} gives NaN or infinite logits on random images; "
                "check its weights."
            )
        teacher = _teacher(pair, images, "In eval mode")
        difference = relative_difference(teacher, student)
        response = 0.0 if difference <= TOLERANCE else _response(pair, images, student)
        pair.forget()
        in_training = _training_difference(pair, sample.shape[1:], generator)
    if not difference <= TOLERANCE:
        kind: type[ExpansionError] = InexactError
        reason = "this network cannot be expanded exactly"
        if response > _MOST_RESPONSE:
            kind = ExpansionError
            reason = (
                "this cannot be told from rounding, since a change of the images by "
                f"{_ROUNDING:.0e} changes the student's own logits by {response:.0e}; train the "
                "student first, or start from weights and statistics under which activations do "
                "not grow from layer to layer"
            )
        raise kind(
            f"The expanded teacher differs from the student by {difference:.1e} (relative, "
            f"float64), more than {TOLERANCE:.0e}: {reason}."
        )
    if in_training is not None and not in_training <= _TRAINING_TOLERANCE:
        raise ExpansionError(
            f"In train mode the expanded teacher differs from the student by {in_training:.1e} "
            "(relative, float64), but not in eval mode, since a part of "
            f"{type(pair.narrow).__name__} that runs in train mode only cannot be expanded; build "
            "the network without this part."
        )
    agreement = (student.flatten(1).argmax(1) == teacher.flatten(1).argmax(1)).double().mean()
    return Certificate(difference, float(agreement), len(images), in_training)


def _response(pair: Pair, images: Tensor, logits: Tensor) -> float:
    """Relative change of the student's logits when the images change by rounding errors.

    Args:
        pair: student and dynamic teacher.
        images: the images, ``[B, C, H, W]``, in float64.
        logits: the student's logits for these images.
    """
    pair.forget()
    changed = images * (1 + _ROUNDING * torch.randn_like(images).sign())
    return relative_difference(pair.student(changed), logits)


def _teacher(pair: Pair, images: Tensor, when: str) -> Tensor:
    """Compute the teacher's logits; to be called after the student has run.

    Args:
        pair: student and dynamic teacher.
        images: a batch, ``[B, C, H, W]``.
        when: beginning of the error message: in which mode the teacher did not run.
    """
    # The student's run has merged every kernel, so an error here comes from the network's own code.
    try:
        logits: Tensor = pair.teacher(images)
    except Exception as error:
        raise ExpansionError(
            f"{when} the expanded teacher does not run ({short_text(error)}), but the student "
            "does; keep the layers concerned narrow (--model.exclude), or choose another student "
            f"than {type(pair.narrow).__name__}."
        ) from error
    return logits


def _training_difference(pair: Pair, shape: torch.Size, generator: torch.Generator) -> float | None:
    """Relative difference of the logits in train mode, or None where it is not defined.

    Dropout and stochastic depth are switched off. The difference is not defined for networks with
    other randomness, and for networks that return several tensors in train mode (auxiliary heads).
    The comparison begins with one image, and takes more where batch statistics need more values or
    amplify rounding errors.

    Args:
        pair: student and dynamic teacher.
        shape: image shape, ``(C, H, W)``.
        generator: random generator of the images.
    """
    pair.train()
    difference: float | None = None
    with _without_dropout(pair):
        for count in (1, 2, 8):
            images = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
            weights, before, given = pair.student_weights(), _random_state(), images.clone()
            try:
                student = pair.student_with(weights, images)
            except Exception:
                continue  # the student's code fails: there are too few values for statistics
            _check_unchanged(pair, images, given)
            if not isinstance(student, Tensor):
                return None
            if not bool(student.isfinite().all()):
                continue
            is_random = _random_state() != before
            teacher = _teacher(pair, images, "In train mode")
            pair.forget()
            if is_random:
                return None
            difference = relative_difference(teacher, student)
            if difference <= _TRAINING_TOLERANCE:
                break
    return difference


def _check_unchanged(pair: Pair, images: Tensor, given: Tensor) -> None:
    """Check that the student has not changed its images, on which the teacher runs as well.

    Args:
        pair: student and dynamic teacher.
        images: the batch that the student ran on.
        given: a copy of the batch from before.

    Raises:
        ExpansionError: when the images have changed.
    """
    if not torch.equal(images, given):
        raise ExpansionError(
            f"{type(pair.narrow).__name__} changes its images in place, but student and dynamic "
            "teacher run on the same images; let it compute new ones (x = x - mean instead of "
            "x -= mean)."
        )


def _random_state() -> tuple[object, ...]:
    """State of the random generators of torch, Python and NumPy."""
    return torch.get_rng_state().numpy().tobytes(), *GeneratorStates.now().plain()


@contextmanager
def _without_dropout(pair: Pair) -> Iterator[None]:
    """Set every drop probability to zero within this context."""
    before = [
        (module, name, value)
        for module in pair.modules()
        for name, value in vars(module).items()
        if isinstance(value, float)
        and ("drop" in name or ("drop" in type(module).__name__.lower() and name in ("p", "prob")))
    ]
    for module, name, _ in before:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _as_before(pair: Pair) -> Iterator[None]:
    """Convert a pair to float64 within this context, and restore the pair afterwards.

    Branches with gates of zero are left out within this context, since they change no bit of the
    result and merging them takes most of the time. Shared kernels become exact expansions (see
    `ExactSharing`), one at a time, when a layer needs its kernel: all of them in float64 would take
    twice the teacher's memory.
    """
    kernels = {
        name: module
        for name, module in pair.named_modules(remove_duplicate=True)
        if isinstance(module, SharedKernel)
        and (module.branches is None or module.branches.is_silent())
    }
    parts = {kernel: dict(kernel._modules) for kernel in kernels.values()}
    for name, kernel in kernels.items():
        kernel.branches = None
        kernel.sharing = ExactSharing(kernel.sharing, name)  # type: ignore[assignment]
    modules = [m for m in pair.modules() if not isinstance(m, parametrize.ParametrizationList)]
    modes = {module: module.training for module in pair.modules()}
    attributes = {module: dict(vars(module)) for module in modules}
    state = {module: (dict(module._parameters), dict(module._buffers)) for module in modules}
    _double(modules)
    try:
        yield
    finally:
        for kernel, before in parts.items():
            kernel._modules.update(before)
        for module, mode in modes.items():
            module.training = mode
        for module, before in attributes.items():
            _put_tensors_back(module, before)
        for module, (parameters, buffers) in state.items():
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        pair.forget()
        refresh(pair)


def _double(modules: Iterable[nn.Module]) -> None:
    """Replace parameters and buffers by copies in float64; tied tensors stay tied."""
    copies: dict[int, Any] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                exact = nn.Parameter(parameter.detach().double(), parameter.requires_grad)
                module._parameters[name] = copies.setdefault(id(parameter), exact)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                dtype = torch.float64 if buffer.is_floating_point() else buffer.dtype
                double = buffer.to(dtype, copy=True)
                module._buffers[name] = copies.setdefault(id(buffer), double)


def _put_tensors_back(module: nn.Module, before: Mapping[str, Any]) -> None:
    """Undo the changes of attributes by a module's own code that keeps float64 tensors in them.

    Args:
        module: a module that has run in float64.
        before: the module's attributes before the run, by name.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor) and value is not before.get(name):
            del vars(module)[name]
            if name in before:
                vars(module)[name] = before[name]
