"""Layers to keep narrow inside a container that cannot be widened exactly."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from gpd_cli.widening.layout import Layout, Segment
from gpd_cli.widening.observe.record import Recording


def inner_layers(recording: Recording, name: str) -> dict[str, Layout]:
    """Narrow layouts for the layers in a container whose outputs stay inside the container."""
    ends = recording.ends.get(name, set())
    return _kept_narrow(recording, name, recording.out_channels.keys() - ends)


def stream_layers(recording: Recording, name: str, container: nn.Module) -> dict[str, Layout]:
    """Narrow layouts for the layers whose outputs leave a child of the container.

    Layers whose outputs are added to these outputs are kept narrow as well.
    """
    parts = [part for part, _ in container.named_children()]
    stream = set().union(*(recording.ends.get(f"{name}.{part}", set()) for part in parts))
    while added := [layers for layers in recording.sums if layers & stream and layers - stream]:
        stream = stream.union(*added)
    return _kept_narrow(recording, name, stream)


def _kept_narrow(recording: Recording, name: str, layers: Iterable[str]) -> dict[str, Layout]:
    return {
        layer: (Segment(recording.out_channels[layer], grows=False),)
        for layer in layers
        if layer.startswith(f"{name}.") and layer in recording.out_channels
    }
