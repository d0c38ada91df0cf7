"""Rules: statements by the user about how the modules of a class widen.

Most networks need no rule: `gpd_cli.widening.search` derives from a module's code which attributes
and tensors widen. A rule is for what the code does not show. It is entered in `RULES`; or the class
has an attribute ``widening_rule``, a mapping of `Rule`'s arguments, and then need not import this
package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from gpd_cli.errors import ExpansionError


@dataclass(frozen=True)
class Rule:
    """How modules of one class widen.

    Args:
        grow: names of attributes that hold a width or a count, and become larger.
        keep: names of attributes and tensors that stay as they are.
        axes: number of the axis that widens, by name of the module's own parameter or buffer.
        blocks: how many neighbouring outputs of a layer are copied together (the width of an
            attention head), by name of the layer inside the module (``qkv``); 0 for a layer whose
            outputs are not copied.

    Example:
        >>> from gpd_cli import RULES, Rule
        >>> RULES["MyAttention"] = Rule(grow=("heads",), axes={"bias": 0}, blocks={"qkv": 32})
    """

    grow: Sequence[str] = ()
    keep: Sequence[str] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)


RULES: dict[str, Rule] = {}
"""Rules by class name; add the rules of your own models."""


def rule_for(module: nn.Module) -> Rule:
    """The rule of a module's class, or of its nearest base class that has a rule; else no rule."""
    found = _ruled_class(module)
    return Rule() if found is None else found[1]


def check_rules(network: nn.Module) -> None:
    """Check that the network has the attributes, tensors and layers that the rules name.

    Args:
        network: the network to expand; rules for classes that it does not have are not checked.

    Raises:
        ExpansionError: when no module of a rule's class has an attribute, tensor or layer that the
            rule names.
    """
    ruled: dict[str, list[nn.Module]] = {}
    for module in network.modules():
        if (found := _ruled_class(module)) is not None:
            ruled.setdefault(found[0], []).append(module)
    for name, modules in ruled.items():
        rule = rule_for(modules[0])
        layers = {layer for module in modules for layer, _ in module.named_modules()}
        missing = [layer for layer in rule.blocks if layer not in layers]
        attributes = (*rule.grow, *rule.keep, *rule.axes)
        missing += [a for a in attributes if not any(hasattr(m, a) for m in modules)]
        if missing:
            raise ExpansionError(
                f"The rule for {name} names '{missing[0]}', which no {name} of this network has; "
                "correct the rule in RULES (grow, keep and axes name attributes, blocks names "
                "layers)."
            )


def _ruled_class(module: nn.Module) -> tuple[str, Rule] | None:
    """The nearest class of a module that has a rule: its name and rule, or None.

    A rule in `RULES` takes precedence over the ``widening_rule`` of the same class.
    """
    for cls in type(module).__mro__:
        if cls.__name__ in RULES:
            return cls.__name__, RULES[cls.__name__]
        if (own := vars(cls).get("widening_rule")) is not None:
            return cls.__name__, _own_rule(cls.__name__, own)
    return None


def _own_rule(name: str, own: Any) -> Rule:
    """The rule that a class states in its attribute ``widening_rule``.

    Args:
        name: name of the class.
        own: value of the attribute.

    Raises:
        ExpansionError: when the value is not a mapping of `Rule`'s arguments.
    """
    known = [entry.name for entry in fields(Rule)]
    if not isinstance(own, Mapping) or not own.keys() <= set(known):
        raise ExpansionError(
            f"The widening_rule of {name} must be a mapping with some of the keys "
            f"{', '.join(known)}, not {own!r}; correct it in the class."
        )
    return Rule(**own)
