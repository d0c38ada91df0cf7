"""What an expansion proves about the dynamic teacher that it built."""

from __future__ import annotations

from dataclasses import dataclass


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
