"""The certificate of an expansion: how well student and dynamic teacher agree."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Certificate:
    """How well student and dynamic teacher agree right after expansion.

    Args:
        difference: largest absolute difference of the logits, relative to the largest logit.
        agreement: fraction of images for which both predict the same class.
        images: number of images.
        in_training: the difference in train mode, without dropout; None where train mode was not
            compared, since the network has other randomness, several outputs, or statistics that
            need larger batches.
    """

    difference: float
    agreement: float
    images: int
    in_training: float | None = None
