"""Stages that are told by what a network computes there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from gpd_cli.features.running import Run
from gpd_cli.features.stage import Stage


def pooled_stage(seen: Run, stages: Iterable[Stage]) -> Stage | None:
    """The last of some stages whose map, averaged over its positions, is what the classifier sees.

    Args:
        seen: a run of the network.
        stages: of it, outputs of modules, in the order in which they ended.

    Returns:
        None if there is no such stage.
    """
    for stage in reversed(list(stages)):
        given = seen.outputs[stage.name]
        if seen.embedding is None or stage.positions == 1 or given.overwritten:
            continue
        mean = stage.as_map(given.tensor).mean(dim=(2, 3))
        if mean.shape == seen.embedding.shape and torch.allclose(
            mean, seen.embedding, rtol=1e-3, atol=1e-4 * float(seen.embedding.abs().max())
        ):
            return stage
    return None


def before_activation(seen: Run, stage: Stage) -> Stage:
    """What the activation is given that a stage ends in; the stage itself if it ends in none.

    Args:
        seen: a run of the network.
        stage: of it.
    """
    for name in seen.inputs:
        if seen.outputs[name].same(seen.outputs[stage.name]):
            return replace(stage, name=name, before=True)
    return stage
