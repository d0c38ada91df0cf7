"""What can be said by hand about the modules of a model of one's own.

Most networks need no rule: which attributes and tensors of a module widen is solved from what its
code does with them (`gpd_cli.widening.search.follow`). A rule settles what does not show
there. A class may carry its own rule as a class attribute, ``widening_rule``, a mapping of `Rule`'s
arguments, and needs no import of this package for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from gpd_cli.errors import ExpansionError


@dataclass(frozen=True)
class Rule:
    """How modules of one class widen.

    Args:
        grow: attributes that hold a width or a count, and become larger.
        keep: attributes and tensors that stay as they are.
        axes: per parameter or buffer of the module's own, the axis that widens.
        blocks: per layer inside the module (``qkv``), how many neighbouring outputs are copied
            together (the width of an attention head); 0 for a layer whose outputs are not copied.

    Example:
        >>> from gpd_cli import RULES, Rule
        >>> RULES["MyAttention"] = Rule(grow=("heads",), axes={"bias": 0}, blocks={"qkv": 32})
    """

    grow: Sequence[str] = ()
    keep: Sequence[str] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)


RULES: dict[str, Rule] = {}
"""Rules by class name; add those of your own models."""

COUNTS = ("num_heads", "n_heads", "nhead", "heads", "num_attention_heads")
"""Names under which attention modules keep their number of heads: tried first."""

FACTORS = ("scale", "scaling", "softmax_scale", "scale_factor", "qk_scale")
"""Names under which attention modules keep the factor of their products."""

PLACES = ("window_size", "kernel_size", "patch_size", "stride", "img_size", "head_dim", "groups")
"""Names of attributes that hold no width, even where the number is one: tried unchanged first."""


def rule_for(module: nn.Module) -> Rule:
    """The rule of a module's class or of a class that it is derived from."""
    found = _ruled_class(module)
    return Rule() if found is None else found[1]


def check_rules(network: nn.Module) -> None:
    """Check that what the rules name is there.

    Args:
        network: to be expanded; rules for classes that it does not have are left alone.

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
                "correct it in RULES (grow, keep and axes name attributes, blocks layers)."
            )


def _ruled_class(module: nn.Module) -> tuple[str, Rule] | None:
    """Name and rule of the nearest class of a module that has a rule; `RULES` go first."""
    for cls in type(module).__mro__:
        if cls.__name__ in RULES:
            return cls.__name__, RULES[cls.__name__]
        if (own := vars(cls).get("widening_rule")) is not None:
            return cls.__name__, Rule(**own)
    return None
