"""Which branches there are, and which of them a user asked for."""

from __future__ import annotations

from collections.abc import Sequence

from gpd_cli.errors import GpdError

PAPER_BRANCHES = ("kxk", "1x1", "1x1_kxk", "1x1_avg", "frequency", "depthwise_separable")
"""The paper's six (Guo et al., ICLR 2025), in the order in which a number M takes the first M."""

EXTRA_BRANCHES = (*PAPER_BRANCHES[1:], "1xk", "kx1")
"""Every branch besides the main kernel; the asymmetric ones (ACNet) are had by name alone."""


def branch_names(spec: int | Sequence[str]) -> tuple[str, ...]:
    """Names of the extra branches a user asked for.

    Args:
        spec: M, for the first M of `PAPER_BRANCHES` (1 is the main kernel alone), or the names
            themselves; ``kxk`` is always there, named or not.

    Returns:
        The names without ``kxk``, in the order given.

    Raises:
        GpdError: on a number out of range, an unknown name, or one given twice.

    Example:
        >>> branch_names(3)
        ('1x1', '1x1_kxk')
        >>> branch_names(["kxk", "frequency"])
        ('frequency',)
    """
    valid = ("kxk", *EXTRA_BRANCHES)
    if isinstance(spec, int):
        if isinstance(spec, bool) or not 1 <= spec <= len(PAPER_BRANCHES):
            raise GpdError(
                f"branches is {spec}, but has to be a number from 1 to {len(PAPER_BRANCHES)} or a "
                f"list of names out of {', '.join(valid)}."
            )
        return PAPER_BRANCHES[1:spec]
    names = (spec,) if isinstance(spec, str) else tuple(spec)
    for name in names:
        if name not in valid:
            raise GpdError(f"There is no branch '{name}'; choose from {', '.join(valid)}.")
        if names.count(name) > 1:
            raise GpdError(f"The branch '{name}' is listed more than once; name each branch once.")
    return tuple(name for name in names if name != "kxk")
