"""Gap Preserving Distillation (Guo et al., ICLR 2025, arXiv 2410.04140).

The library's front door is `expand`::

    from gpd_cli import expand

    pair = expand(student, ratio=2, branches=6, sample=torch.randn(2, 3, 224, 224))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpd_cli.errors import ExpansionError, GpdError
    from gpd_cli.expansion import Pair, WidthPlan, expand
    from gpd_cli.training.ema import EMA

__all__ = ["EMA", "ExpansionError", "GpdError", "Pair", "WidthPlan", "expand"]


def __getattr__(name: str) -> Any:
    # On demand, so that `gpd --help` does not wait for torch.
    if name in ("ExpansionError", "GpdError"):
        from gpd_cli import errors

        return getattr(errors, name)
    if name == "EMA":
        from gpd_cli.training import ema

        return ema.EMA
    if name in __all__:
        from gpd_cli import expansion

        return getattr(expansion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
