"""Proof on the spot that a dynamic teacher computes its student's function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpd_cli.errors import ExpansionError
from gpd_cli.expansion.compare import relative_difference
from gpd_cli.expansion.pair import Pair

TOLERANCE = 1e-9
"""Largest relative difference of the logits, in float64, that passes for equal."""


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
    modes = {module: module.training for module in pair.modules()}
    pair.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        student, teacher = pair(images)
    for module, mode in modes.items():
        module.training = mode
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
    agreement = (student.flatten(1).argmax(1) == teacher.flatten(1).argmax(1)).double().mean()
    return Certificate(difference, float(agreement), len(images))
