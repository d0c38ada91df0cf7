"""What can be said by hand about the modules of a model of one's own.

Most networks need no rule: which attributes and tensors of a module widen is found by trial
(`gpd_cli.expansion.probing.widening`). A rule settles it where trial finds nothing, or too late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn


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
        >>> from gpd_cli.expansion import RULES, Rule
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
    for cls in type(module).__mro__:
        if cls.__name__ in RULES:
            return RULES[cls.__name__]
    return Rule()
