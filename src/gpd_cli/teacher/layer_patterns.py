"""Patterns of layer names in the forms in which users write them."""

from __future__ import annotations

from collections.abc import Sequence


def layer_patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Read patterns of layer names in any of the forms in which users write them.

    Args:
        given: one pattern, several with commas between them (in brackets or not), or a list.

    Example:
        >>> layer_patterns("layer4.*")
        ('layer4.*',)
        >>> layer_patterns("[*.conv1, head]")  # no YAML list, since a star begins a YAML alias
        ('*.conv1', 'head')
    """
    if not isinstance(given, str):
        return tuple(given or ())
    if given.startswith("[") and given.endswith("]"):
        given = given[1:-1]
    patterns = (pattern.strip().strip("'\"") for pattern in given.split(","))
    return tuple(pattern for pattern in patterns if pattern)
