"""Gap Preserving Distillation (Guo et al., ICLR 2025, arXiv 2410.04140).

The library's entry point is `expand`::

    from gpd_cli import expand

    pair = expand(student, ratio=2, branches=6, sample=torch.randn(2, 3, 224, 224))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpd_cli.errors import ExpansionError, GpdError
    from gpd_cli.teacher import Pair, expand
    from gpd_cli.training.ema import EMA
    from gpd_cli.widening import RULES, Rule, WidthPlan

__all__ = ["EMA", "RULES", "ExpansionError", "GpdError", "Pair", "Rule", "WidthPlan", "expand"]

_MODULES = {
    "errors": ("ExpansionError", "GpdError"),
    "teacher": ("Pair", "expand"),
    "training.ema": ("EMA",),
    "widening": ("RULES", "Rule", "WidthPlan"),
}


def __getattr__(name: str) -> Any:
    # On demand, so that `gpd --help` does not wait for torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
