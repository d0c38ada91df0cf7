"""Where a network's stages end and what its classifier is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from gpd_cli.distill.features.defaults import default_stages, known_stages
from gpd_cli.distill.features.running import Run, Seen, run
from gpd_cli.distill.features.stage import Form, Layout, Stage
from gpd_cli.distill.features.values import before_activation, pooled_stage
from gpd_cli.errors import MethodError


@dataclass(frozen=True)
class Places:
    """Where to look in a network.

    Args:
        stages: from shallow to deep.
        classifier: name of the linear layer that gives the logits, or None.
        embedding: its number of inputs, F; 0 without one.
    """

    stages: tuple[Stage, ...] = ()
    classifier: str | None = None
    embedding: int = 0


def find_places(
    network: nn.Module,
    shape: tuple[int, int, int],
    *,
    names: Sequence[str] | None = None,
    like: Places | None = None,
    pooled: bool = False,
    preactivation: bool = False,
) -> Places:
    """Find the stages and the classifier of a network by running it on two images of noise.

    By default the stages are those timm lists in ``feature_info``; in other networks the last
    module at each resolution; in both the deepest four. Where all have one resolution (most
    transformers) they are blocks at even distances.

    Args:
        network: a classifier; left as it was.
        shape: of its images, ``(C, H, W)``.
        names: modules whose outputs are the stages, from shallow to deep.
        like: places of a narrow network, to look at the same ones in its dynamic teacher; it has
            everything that follows.
        pooled: look for a single stage, the map whose mean over its positions the classifier sees.
            There may be none.
        preactivation: of each stage take what its activation is given, see `before_activation`.

    Raises:
        MethodError: when there is no such module, or its output is neither map nor tokens.
    """
    modules = dict(network.named_modules())
    for name in names or ():
        if name not in modules or not name:
            raise MethodError(
                f"{type(network).__name__} has no module '{name}' to take features from; its "
                f"first are {', '.join(n for n, _ in network.named_children())}."
            )
    seen = run(network, shape)
    layout = Layout.of(network, shape[1:])
    if like is not None:
        stages = [_stage(network, seen, layout, s.name, s.before, s.form) for s in like.stages]
    else:
        if names is not None:
            stages = [_stage(network, seen, layout, name) for name in names]
        elif pooled:
            stages = known_stages(seen.outputs, seen.outputs, layout)
        else:
            stages = list(default_stages(network, seen.outputs, layout))
        if pooled:
            last = pooled_stage(seen, stages)
            stages = [] if last is None else [last]
        if preactivation:
            stages = [before_activation(seen, stage) for stage in stages]
    found = tuple(_with_care(seen, stage) for stage in stages)
    if seen.classifier is None:
        return Places(found)
    linear = modules[seen.classifier]
    assert isinstance(linear, nn.Linear)
    return Places(found, seen.classifier, linear.in_features)


def _stage(
    network: nn.Module,
    seen: Run,
    layout: Layout,
    name: str,
    before: bool = False,
    form: Form | None = None,
) -> Stage:
    """A stage that a user names, or one of the narrow network's in its dynamic teacher."""
    there = seen.at(name, before)
    stage = None if there is None else layout.stage(name, there.shape, form)
    if stage is None:
        raise MethodError(_unusable(network, name, there))
    return replace(stage, before=before)


def _with_care(seen: Run, stage: Stage) -> Stage:
    """The stage, which says whether it has to be copied."""
    there = seen.at(stage.name, stage.before)
    return replace(stage, overwritten=there is not None and there.overwritten)


def _unusable(network: nn.Module, name: str, seen: Seen | None) -> str:
    got = "nothing for each image" if seen is None else f"a tensor of shape {list(seen.shape)}"
    return (
        f"Module '{name}' of {type(network).__name__} gives {got}, and features have to be a map "
        "[B, C, H, W] or tokens [B, N, C]; name another module."
    )
