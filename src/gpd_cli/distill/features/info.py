"""Find the stages and the classifier of a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from gpd_cli.distill.features.defaults import default_stages, known_stages
from gpd_cli.distill.features.running import Recorded, Run, run
from gpd_cli.distill.features.stage import Form, ShapeHints, Stage
from gpd_cli.distill.features.values import before_activation, pooled_stage
from gpd_cli.errors import MethodError


@dataclass(frozen=True)
class FeatureInfo:
    """The stages and the classifier of a network, as far as a method needs them.

    Args:
        stages: the stages, from shallow to deep.
        classifier: name of the linear layer that gives the logits, or None.
        embedding: width of the embedding, F (the classifier's in_features); 0 without a classifier.
    """

    stages: tuple[Stage, ...] = ()
    classifier: str | None = None
    embedding: int = 0


def find_features(
    network: nn.Module,
    shape: tuple[int, int, int],
    *,
    names: Sequence[str] | None = None,
    like: FeatureInfo | None = None,
    pooled: bool = False,
    preactivation: bool = False,
) -> FeatureInfo:
    """Find the stages and the classifier of a network by running the network on noise.

    By default the stages are the modules in timm's ``feature_info``, and in other networks the last
    module at each resolution; in either case the deepest four are taken. Where all modules have one
    resolution (most transformers), the stages are blocks at even distances.

    Args:
        network: a classifier, which is left unchanged.
        shape: image shape, ``(C, H, W)``.
        names: names of the modules whose outputs are the stages, from shallow to deep.
        like: the result for the student. The dynamic teacher then gets the same stages, and the
            arguments `names`, `pooled` and `preactivation` have no effect.
        pooled: whether there is to be a single stage, the map whose mean over positions is the
            classifier's input. Without such a map there is no stage.
        preactivation: whether each stage is taken before its last activation, see
            `before_activation`.

    Raises:
        MethodError: when a named module does not exist, its output is neither a map nor tokens, or
            the network keeps its tokens in an order of its own, and no modules are named.
    """
    modules = dict(network.named_modules())
    for name in names or ():
        if name not in modules or not name:
            raise MethodError(
                f"{type(network).__name__} has no module '{name}' to take features from; its first "
                f"modules are {', '.join(n for n, _ in network.named_children())}."
            )
    seen = run(network, shape)
    hints = ShapeHints.of(network, shape[1:])
    if like is not None:
        stages = [_stage(network, seen, hints, s.name, s.before, s.form) for s in like.stages]
    else:
        if names is not None:
            stages = [_stage(network, seen, hints, name) for name in names]
        elif pooled:
            stages = known_stages(seen.outputs, seen.outputs, hints)
        elif hints.reorders:
            raise MethodError(
                f"{type(network).__name__} keeps its tokens in another order than row by row, so "
                "that its stages are no maps; choose a method that compares logits, such as DKD, "
                "or another network."
            )
        else:
            stages = list(default_stages(network, seen.outputs, hints))
        if pooled:
            last = pooled_stage(seen, stages)
            stages = [] if last is None else [last]
        if preactivation:
            stages = [before_activation(seen, stage) for stage in stages]
    found = tuple(_noting_overwrites(seen, stage) for stage in stages)
    if seen.classifier is None:
        return FeatureInfo(found)
    linear = modules[seen.classifier]
    assert isinstance(linear, nn.Linear)
    return FeatureInfo(found, seen.classifier, linear.in_features)


def at_size(network: nn.Module, info: FeatureInfo, shape: tuple[int, int, int]) -> FeatureInfo:
    """Find the heights and widths of a network's stages for images of another size.

    Args:
        network: the network, which is left unchanged.
        info: stages and classifier of the network, from `find_features`.
        shape: shape of the images, ``(C, H, W)``.

    Returns:
        The same stages and classifier, with the heights and widths for images of this size.

    Raises:
        MethodError: when the tokens of a stage do not make up a map in such images.
    """
    seen = run(network, shape)
    stages = []
    for stage in info.stages:
        there = seen.at(stage.name, stage.before)
        if there is not None:
            height, width = stage.as_map(there.tensor).shape[-2:]
            stage = replace(stage, height=height, width=width)
        stages.append(stage)
    return replace(info, stages=tuple(stages))


def _stage(
    network: nn.Module,
    seen: Run,
    hints: ShapeHints,
    name: str,
    before: bool = False,
    form: Form | None = None,
) -> Stage:
    """Make the stage of a module that the user, or a stage of the student, names.

    Args:
        network: the network, for the error message.
        seen: a run of the network.
        hints: what the network says about the shapes of its features.
        name: name of the module.
        before: whether the stage is the module's input instead of its output.
        form: form of the stage's output, if known.
    """
    there = seen.at(name, before)
    stage = None if there is None else hints.stage(name, there.shape, form)
    if stage is None:
        raise MethodError(_unusable(network, name, there))
    return replace(stage, before=before)


def _noting_overwrites(seen: Run, stage: Stage) -> Stage:
    """The same stage, with `overwritten` set by what the network does to the stage's output."""
    there = seen.at(stage.name, stage.before)
    return replace(stage, overwritten=there is not None and seen.overwrites(there))


def _unusable(network: nn.Module, name: str, seen: Recorded | None) -> str:
    got = "nothing for each image" if seen is None else f"a tensor of shape {list(seen.shape)}"
    return (
        f"Module '{name}' of {type(network).__name__} gives {got}, but features must be a map [B, "
        "C, H, W] or tokens [B, N, C]; name another module."
    )
