"""Remember how attributes of a class's modules have grown, for other modules of the class.

Some code computes a number from an attribute and the size of a wide tensor, such as a scale of
``(channels // self.num_heads) ** -0.5``. This code runs with a wrong number at first, and has to
run a second time once the attribute is solved for. In the next module of the class, the attribute
grows before the first run.
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
    """Remembers, for each class of modules, which attributes have grown and by which factors.

    Args:
        modules: the student's modules, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._factors: dict[type, dict[str, Fraction]] = {}

    def remember(self, name: str, before: Attributes, after: Attributes) -> None:
        """Note which attributes of a module, or of modules inside it, have grown.

        Args:
            name: name of the module.
            before: the wide values of all attributes that had grown before.
            after: the wide values of all attributes that have grown by now. If one of the new ones
                is a tuple or list, nothing is remembered.
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
        """Predict the wide attributes of a module from another module of its class.

        Args:
            name: name of the module.
            grown: attributes that have grown already, which are left out.

        Returns:
            Wide values by qualified module name and attribute name. Empty if nothing is known about
            the class, or a value would be no integer.
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
