"""Losses: pure functions of logits and labels, and the classes that carry their settings."""

from gpd_cli.losses.functional import (
    dkd_loss,
    gap_loss,
    kd_loss,
    soft_cross_entropy,
)
from gpd_cli.losses.methods import DKD, KD, METHODS, StaticTeacherLoss, make_method

__all__ = [
    "DKD",
    "KD",
    "METHODS",
    "StaticTeacherLoss",
    "dkd_loss",
    "gap_loss",
    "kd_loss",
    "make_method",
    "soft_cross_entropy",
]
