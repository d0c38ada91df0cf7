"""Limits of YAML, whose aliases and brackets make gigabytes, or a deep stack, of a short text."""

from __future__ import annotations

import yaml

_DEEPEST = 60  # levels of mappings and lists
_MOST = 100_000  # values, those of an alias counted each time
_LONGEST = 4_000_000  # characters


def check_limits(text: str) -> None:
    """Check a text before a loader makes anything of it.

    Args:
        text: YAML.

    Raises:
        yaml.YAMLError: when the text is no YAML, is too long or too deep, or has aliases that
            stand for too many values or for what they are in.
    """
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters, and may have {_LONGEST:,}")
    open_nodes: list[tuple[str | None, int]] = []  # anchors, and the count at their beginning
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in open_nodes):
                raise yaml.YAMLError(f"the alias *{anchor} stands for what it is in")
            count += sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, count))
            count += 1
            if len(open_nodes) > _DEEPEST:
                raise yaml.YAMLError(f"it has more than {_DEEPEST} levels of brackets or indents")
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            if name is not None:
                sizes[name] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if anchor is not None:
                sizes[anchor] = 1
        if count > _MOST:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST:,} values")
