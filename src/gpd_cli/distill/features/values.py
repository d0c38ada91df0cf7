"""Find stages by comparing the tensors of a run: before global pooling, and before activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from gpd_cli.distill.features.running import Run
from gpd_cli.distill.features.stage import Stage


def pooled_stage(seen: Run, stages: Iterable[Stage]) -> Stage | None:
    """Find the last stage whose map, averaged over positions, is the classifier's input.

    Args:
        seen: a run of the network.
        stages: stages that are outputs of modules, in the order in which the modules ended.

    Returns:
        The stage, or None if there is none.
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
    """Move a stage that ends in an activation to the input of this activation.

    A stage of pre-activation blocks (Wide ResNet) ends in a sum, which the next norm normalizes for
    the next activation. Such a stage is moved to the input of that activation. A stage without an
    activation of either kind stays where it is.

    Args:
        seen: a run of the network.
        stage: a stage of the network.

    Returns:
        The stage that was moved, or the same stage.
    """
    end = seen.outputs[stage.name]
    for name in seen.inputs:
        if seen.outputs[name].same(end):
            return replace(stage, name=name, before=True)
    norms = [norm for norm, given in seen.norm_inputs.items() if given.same(end)]
    for name, given in seen.inputs.items():
        for norm in norms:
            # Some of timm's norms have their activation inside.
            if seen.outputs[norm].same(given) or name.startswith(f"{norm}."):
                return replace(stage, name=name, before=True)
    return stage
