"""How attributes have grown in modules of a class, to begin other modules of the class with.

Code that computes a number from an attribute and the size of a wide tensor, such as a scale of
``(channels // self.num_heads) ** -0.5``, runs with a wrong number until the attribute is solved
for, and is run once more then. In the next module of the class the attribute grows at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from torch import nn

from gpd_cli.widening.names import is_inside, local_name, qualified, split_name

Attributes = Mapping[str, Mapping[str, Any]]
"""Values of attributes, by qualified name of the module and name of the attribute."""


class Solutions:
    """Remembers per class of modules which attributes have grown, and by which factors.

    Args:
        modules: the student's modules, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._factors: dict[type, dict[str, Fraction]] = {}

    def remember(self, name: str, before: Attributes, after: Attributes) -> None:
        """Note which attributes of a module, or of modules inside it, have grown.

        Args:
            name: the module.
            before: the attributes that had grown before.
            after: those that have grown now. Where one is not a number but a tuple or list,
                nothing is remembered.
        """
        factors: dict[str, Fraction] = {}
        for owner, values in after.items():
            for attribute in values.keys() - before.get(owner, {}).keys():
                narrow, wide = getattr(self._modules[owner], attribute), values[attribute]
                if not is_inside(qualified(owner, attribute), name):
                    continue
                if type(narrow) is not int or not narrow or type(wide) is not int:
                    return
                factors[local_name(qualified(owner, attribute), name)] = Fraction(wide, narrow)
        self._factors[type(self._modules[name])] = factors

    def of(self, name: str, grown: Attributes) -> dict[str, dict[str, int]]:
        """The attributes of a module as they have grown in another one of its class.

        Args:
            name: the module.
            grown: attributes that have grown already, and are left out.

        Returns:
            The values, by name of the owner; empty where none are known or one is no whole number.
        """
        found: dict[str, dict[str, int]] = {}
        for local, factor in self._factors.get(type(self._modules[name]), {}).items():
            owner, attribute = split_name(qualified(name, local))
            if attribute in grown.get(owner, {}):
                continue
            narrow = getattr(self._modules.get(owner), attribute, None)
            wide = narrow * factor if type(narrow) is int else None
            if wide is None or wide.denominator != 1:
                return {}
            found.setdefault(owner, {})[attribute] = int(wide)
        return found
