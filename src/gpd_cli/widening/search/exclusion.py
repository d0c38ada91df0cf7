"""Layers that a user excludes from widening."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from gpd_cli.errors import ExpansionError


def excluded_layers(layers: Sequence[str], patterns: str | Sequence[str]) -> set[str]:
    """The layers that match some patterns.

    Args:
        layers: names of all layers.
        patterns: patterns of layer names, or names of modules that are excluded as a whole.

    Raises:
        ExpansionError: when a pattern matches no layer.
    """
    excluded = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {
            layer
            for layer in layers
            if fnmatchcase(layer, pattern) or layer.startswith(f"{pattern}.")
        }
        if not found:
            raise ExpansionError(
                f"No layer is named '{pattern}'; give patterns of layer names to exclude, such as "
                f"'{layers[0] if layers else 'layer4.*'}'."
            )
        excluded |= found
    return excluded
