"""Losses of the joint objective, as pure functions of logits and labels."""

from gpd_cli.losses.gap import gap_loss, soft_cross_entropy

__all__ = ["gap_loss", "soft_cross_entropy"]
