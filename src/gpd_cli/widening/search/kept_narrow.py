"""What may stay narrow inside of a container that nothing else makes exact."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from gpd_cli.widening.layout import Layout, Segment
from gpd_cli.widening.observe.record import Recording


def inner_layers(recording: Recording, name: str) -> dict[str, Layout]:
    """The layers inside of a container whose outputs do not leave it, kept narrow."""
    ends = recording.ends.get(name, set())
    return _kept_narrow(recording, name, recording.sizes.keys() - ends)


def stream_layers(recording: Recording, name: str, container: nn.Module) -> dict[str, Layout]:
    """The layers inside of a container whose outputs leave one of its parts, kept narrow.

    So are those whose outputs are added to theirs.
    """
    parts = [part for part, _ in container.named_children()]
    stream = set().union(*(recording.ends.get(f"{name}.{part}", set()) for part in parts))
    while added := [layers for layers in recording.sums if layers & stream and layers - stream]:
        stream = stream.union(*added)
    return _kept_narrow(recording, name, stream)


def _kept_narrow(recording: Recording, name: str, layers: Iterable[str]) -> dict[str, Layout]:
    return {
        layer: (Segment(recording.sizes[layer], grows=False),)
        for layer in layers
        if layer.startswith(f"{name}.") and layer in recording.sizes
    }
