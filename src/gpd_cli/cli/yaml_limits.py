"""Limits for YAML texts, since a short text may expand to gigabytes or to a very deep nesting.

Aliases can multiply the number of values, and brackets the number of levels.
"""

from __future__ import annotations

import yaml

_DEEPEST = 60  # levels of mappings and lists
_MOST = 100_000  # values, where the values of an alias count at each use
_LONGEST = 4_000_000  # characters


def check_limits(text: str) -> None:
    """Check a text before a loader constructs its values.

    Args:
        text: text in YAML.

    Raises:
        yaml.YAMLError: when the text is not valid YAML, is too long or too deeply nested, or has
            aliases that expand to too many values or contain themselves.
    """
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than the {_LONGEST:,} allowed")
    # For each open mapping or list: its anchor, and the number of values before its beginning.
    open_nodes: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in open_nodes):
                raise yaml.YAMLError(f"the alias *{anchor} stands for the value that contains it")
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
