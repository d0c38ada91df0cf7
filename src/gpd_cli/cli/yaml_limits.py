"""Limits for YAML texts, since a short text may expand to gigabytes or to a very deep nesting.

Aliases can multiply the number of values, and brackets the number of levels. A key that is written
twice is refused as well: loaders silently keep the second value only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml

_DEEPEST = 60  # levels of mappings and lists
_MOST = 100_000  # values, where the values of an alias count at each use
_LONGEST = 4_000_000  # characters


@dataclass
class _Open:
    """A mapping or list whose end has not been read yet.

    Attributes:
        anchor: its anchor; None without one.
        before: number of values before its beginning.
        is_mapping: whether it is a mapping.
        children: number of keys and values so far.
        keys: its keys so far, as they are written.
    """

    anchor: str | None
    before: int
    is_mapping: bool
    children: int = 0
    keys: set[str] = field(default_factory=set)

    def add(self, event: yaml.Event) -> None:
        """Count a key or value, and refuse a key for the second time."""
        is_key = self.is_mapping and self.children % 2 == 0
        self.children += 1
        if not (is_key and isinstance(event, yaml.ScalarEvent)):
            return
        if event.value == "<<" and event.implicit[0]:  # all merged mappings count
            return
        if event.value in self.keys:
            line = event.start_mark.line + 1
            raise yaml.YAMLError(
                f"the entry '{event.value}' is written a second time in line {line}, and only one "
                "of the two would count"
            )
        self.keys.add(event.value)


def check_limits(text: str) -> None:
    """Check a text before a loader constructs its values.

    Args:
        text: text in YAML.

    Raises:
        yaml.YAMLError: when the text is not valid YAML, is too long or too deeply nested, has
            aliases that expand to too many values or contain themselves, or a key twice.
    """
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than the {_LONGEST:,} allowed")
    open_nodes: list[_Open] = []
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if open_nodes and isinstance(event, yaml.NodeEvent):
            open_nodes[-1].add(event)
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == node.anchor for node in open_nodes):
                raise yaml.YAMLError(f"the alias *{anchor} stands for the value that contains it")
            count += sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            open_nodes.append(_Open(anchor, count, is_mapping))
            count += 1
            if len(open_nodes) > _DEEPEST:
                raise yaml.YAMLError(f"it has more than {_DEEPEST} levels of brackets or indents")
        elif isinstance(event, yaml.CollectionEndEvent):
            node = open_nodes.pop()
            if node.anchor is not None:
                sizes[node.anchor] = count - node.before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if anchor is not None:
                sizes[anchor] = 1
        if count > _MOST:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST:,} values")
