"""Proof on the spot that a dynamic teacher computes its student's function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gpd_cli.errors import ExpansionError
from gpd_cli.expansion.compare import relative_difference
from gpd_cli.expansion.kernel import SharedKernel
from gpd_cli.expansion.pair import Pair
from gpd_cli.expansion.refresh import refresh

TOLERANCE = 1e-9
"""Largest relative difference of the logits, in float64, that passes for equal."""

_TRAINING_TOLERANCE = 1e-6  # statistics of a small batch can blow up rounding, but not to this

_TRAINING_BATCH = 2


@dataclass(frozen=True)
class Certificate:
    """How well student and dynamic teacher agree right after expansion.

    Args:
        difference: largest absolute difference of the logits, relative to the largest logit.
        agreement: fraction of images for which both predict the same class.
        images: number of images.
    """

    difference: float
    agreement: float
    images: int


def certify(pair: Pair, sample: Tensor) -> Certificate:
    """Compare both networks on random images.

    Args:
        pair: in float64; left in the mode it is in.
        sample: a batch whose shape the images take.

    Returns:
        The certificate.

    Raises:
        ExpansionError: when the relative difference exceeds `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(sample.shape[0])
    images = torch.randn(sample.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _as_before(pair):
        student, teacher = pair.eval().one_by_one(images)
        in_training = _training_difference(pair, images)
    if not bool(torch.isfinite(student).all()):
        raise ExpansionError(
            f"{type(pair.narrow).__name__} gives NaN or infinite logits on random images; check "
            "its weights."
        )
    difference = relative_difference(teacher, student)
    if not difference <= TOLERANCE:
        raise ExpansionError(
            f"The expanded teacher differs from the student by {difference:.1e} (relative, "
            f"float64), more than {TOLERANCE:.0e}: this network cannot be expanded exactly."
        )
    if not in_training <= _TRAINING_TOLERANCE:
        raise ExpansionError(
            f"In train mode the expanded teacher differs from the student by {in_training:.1e} "
            "(relative, float64), though not in eval mode: something in "
            f"{type(pair.narrow).__name__} that runs in train mode only cannot be expanded."
        )
    agreement = (student.flatten(1).argmax(1) == teacher.flatten(1).argmax(1)).double().mean()
    return Certificate(difference, float(agreement), len(images))


def _training_difference(pair: Pair, images: Tensor) -> float:
    """The relative difference of the logits in train mode, 0 where that says nothing.

    It says nothing with dropout and its like, and where the batch is too small for statistics.
    """
    images = images[:_TRAINING_BATCH]
    pair.train()
    try:
        before = torch.get_rng_state()
        student = pair.student(images)
        random = not torch.equal(before, torch.get_rng_state())
        if random or not bool(student.isfinite().all()):
            return 0.0
        return relative_difference(pair.teacher(images), student)
    except Exception:
        return 0.0  # too few values for statistics, or several heads in train mode


@contextmanager
def _as_before(pair: Pair) -> Iterator[None]:
    """Put modes and buffers (running statistics) back afterwards.

    Meanwhile branches whose gates are zero are left out: they change nothing to the last bit, and
    merging them takes most of the time.
    """
    kernels = [module for module in pair.modules() if isinstance(module, SharedKernel)]
    silent = {k: k.branches for k in kernels if k.branches is not None and k.branches.is_silent()}
    for kernel in silent:
        kernel.branches = None
    modes = {module: module.training for module in pair.modules()}
    buffers = {buffer: buffer.clone() for buffer in pair.buffers()}
    try:
        yield
    finally:
        for kernel, branches in silent.items():
            kernel.branches = branches
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers.items():
            buffer.copy_(value)
        pair.forget()
        refresh(pair)
