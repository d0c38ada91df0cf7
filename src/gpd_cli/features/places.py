"""Where a network's stages end and what its classifier is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from gpd_cli.errors import MethodError
from gpd_cli.features.defaults import default_stages
from gpd_cli.features.running import Seen, run
from gpd_cli.features.stage import Layout, Stage


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
) -> Places:
    """Find the stages and the classifier of a network by running it on two black images.

    By default the stages are those timm lists in ``feature_info``; in other networks the last
    module at each resolution; in both the deepest four. Where all have one resolution (most
    transformers) they are blocks at even distances.

    Args:
        network: a classifier; left as it was.
        shape: of its images, ``(C, H, W)``.
        names: modules whose outputs are the stages, from shallow to deep.
        like: places of a narrow network, to look at the same ones in its dynamic teacher.

    Raises:
        MethodError: when there is no such module, or its output is neither map nor tokens.
    """
    forms = {} if like is None else {stage.name: stage.form for stage in like.stages}
    if like is not None:
        names = list(forms)
    modules = dict(network.named_modules())
    for name in names or ():
        if name not in modules or not name:
            raise MethodError(
                f"{type(network).__name__} has no module '{name}' to take features from; its "
                f"first are {', '.join(n for n, _ in network.named_children())}."
            )
    outputs, classifier = run(network, shape)
    layout = Layout.of(network, shape[1:])
    stages = default_stages(network, outputs, layout) if names is None else ()
    for name in names or ():
        seen = outputs.get(name)
        stage = None if seen is None else layout.stage(name, seen.shape, forms.get(name))
        if stage is None:
            raise MethodError(_unusable(network, name, seen))
        stages = (*stages, stage)
    stages = tuple(replace(s, overwritten=outputs[s.name].overwritten) for s in stages)
    if classifier is None:
        return Places(stages)
    linear = modules[classifier]
    assert isinstance(linear, nn.Linear)
    return Places(stages, classifier, linear.in_features)


def _unusable(network: nn.Module, name: str, seen: Seen | None) -> str:
    got = "nothing for each image" if seen is None else f"a tensor of shape {list(seen.shape)}"
    return (
        f"Module '{name}' of {type(network).__name__} gives {got}, and features have to be a map "
        "[B, C, H, W] or tokens [B, N, C]; name another module."
    )
