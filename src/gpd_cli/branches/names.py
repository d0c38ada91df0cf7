"""The names of all branches, of those that a user asks for, and of those that a layer can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from gpd_cli.errors import GpdError

BranchInit = Literal["zero", "orepa", "gpd"]
"""Initial values of the branches.

``zero``: every gate at zero, and a gate on the main kernel at one. ``orepa``: OREPA's gates and
weights. ``gpd``: gates and weights of the authors' block, as in the code of the paper's authors.
"""

PAPER_BRANCHES = ("kxk", "1x1", "1x1_kxk", "1x1_avg", "frequency", "depthwise_separable")
"""The paper's six branches (Guo et al., ICLR 2025); a number M stands for the first M of them."""

MAIN_GATE = "main_gate"
"""Name of the gate on the main kernel, listed among the branches; it marks the authors' block."""

AUTHORS_BRANCHES = (
    MAIN_GATE,
    "1x1_avg",
    "frequency",
    "1x1_kxk",
    "kxk_2",
    "depthwise_separable",
)
"""The authors' block: the branches in the code of the paper's authors (guoyongcs/GPD), in order.

The block has a gate on the main kernel, and a second k x k kernel in place of OREPA's 1 x 1. Here
the student's kernel is merged from slices of the branches' factors; without the block it is a slice
of the merged kernel. The two definitions differ for ``1x1_kxk`` only, whose inner channels are
sliced as well.
"""

EXTRA_BRANCHES = (
    *PAPER_BRANCHES[1:],
    "kxk_2",
    "1xk",
    "kx1",
    "identity",
    "do_conv",
    "expandnet",
    "linear",
)
"""Every branch besides the main kernel. Those that are not the paper's have to be named."""

BRANCH_SETS = {
    "paper": PAPER_BRANCHES,
    "gpd": AUTHORS_BRANCHES,
    "orepa": PAPER_BRANCHES,
    "dbb": ("kxk", "1x1", "1x1_kxk", "1x1_avg"),
    "acnet": ("kxk", "1xk", "kx1"),
    "repvgg": ("kxk", "1x1", "identity"),
}
"""Names that stand for all branches of a published block.

The blocks are OREPA (Hu et al., CVPR 2022), whose six branches the paper took over; the block in
the code of the paper's authors (``gpd``); the diverse branch block, DBB (Ding et al., CVPR 2021);
ACNet (Ding et al., ICCV 2019); and RepVGG (Ding et al., CVPR 2021).
"""


def branch_names(
    spec: int | str | Sequence[str], init: BranchInit | None = None
) -> tuple[str, ...]:
    """Names of the extra branches that a user asks for.

    Args:
        spec: a number M, for the first M of `PAPER_BRANCHES` (1 is the main kernel alone), or names
            of branches or of `BRANCH_SETS`. The main kernel ``kxk`` is always included, named or
            not, and a branch of several sets is included once.
        init: initial values of the branches. With ``gpd`` a number M stands for the first M of
            `AUTHORS_BRANCHES`, which begin with the gate on the main kernel. None skips the check
            that the names fit the initial values.

    Returns:
        The names of the branches without ``kxk``, in the order given.

    Raises:
        GpdError: on a number out of range, an unknown name, a name given twice, or branches that
            do not fit each other or ``init``.

    Example:
        >>> branch_names(3)
        ('1x1', '1x1_kxk')
        >>> branch_names(["kxk", "frequency"])
        ('frequency',)
        >>> branch_names(["acnet", "repvgg"])
        ('1xk', 'kx1', '1x1', 'identity')
        >>> branch_names(2, "gpd")
        ('main_gate', '1x1_avg')
    """
    valid = ("kxk", *EXTRA_BRANCHES, MAIN_GATE, *BRANCH_SETS)
    if isinstance(spec, int):
        if isinstance(spec, bool) or not 1 <= spec <= len(PAPER_BRANCHES):
            raise GpdError(
                f"branches must be a number from 1 to {len(PAPER_BRANCHES)} or a list of names "
                f"from {', '.join(valid)}, not {spec}."
            )
        return AUTHORS_BRANCHES[:spec] if init == "gpd" else PAPER_BRANCHES[1:spec]
    if not isinstance(spec, Sequence):
        raise GpdError(
            f"branches must be a number or a list of names from {', '.join(valid)}, not {spec!r}."
        )
    names = (spec,) if isinstance(spec, str) else tuple(spec)
    for name in names:
        if name not in valid:
            raise GpdError(f"There is no branch '{name}'; choose from {', '.join(valid)}.")
        if names.count(name) > 1:
            raise GpdError(f"The branch '{name}' is listed more than once; name each branch once.")
    members = [member for name in names for member in BRANCH_SETS.get(name, (name,))]
    found = tuple(dict.fromkeys(name for name in members if name != "kxk"))
    _check_authors_block(found, init)
    return found


def count_branches(names: Sequence[str]) -> int:
    """The number of branches of a kernel, the main kernel included.

    Args:
        names: branches, as `branch_names` returns them.
    """
    return 1 + sum(name != MAIN_GATE for name in names)


def _check_authors_block(names: tuple[str, ...], init: BranchInit | None) -> None:
    """Refuse the authors' block with other branches, or with an ``init`` that does not fit."""
    others = [name for name in names if name not in AUTHORS_BRANCHES]
    is_authors = MAIN_GATE in names
    if is_authors and others:
        raise GpdError(
            f"The branch '{others[0]}' does not belong to the authors' block, which '{MAIN_GATE}' "
            f"and 'gpd' stand for; leave it out, or choose from {', '.join(AUTHORS_BRANCHES)}."
        )
    if init == "gpd" and not is_authors:
        raise GpdError(
            "branch_init gpd is for the authors' block only; set branches to gpd, to a number from "
            f"1 to {len(AUTHORS_BRANCHES)}, or to a list of names with '{MAIN_GATE}'."
        )
    if init == "orepa" and is_authors:
        raise GpdError(
            "The authors' block (branches gpd) cannot be initialized by branch_init orepa; set "
            "branch_init to gpd, or to zero for fine-tuning."
        )


def accepted_branches(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Select, out of some branches, those that a layer can take.

    A 2-D convolution with a kernel of 3 x 3 or larger takes every branch but ``linear``, and
    ``identity`` only if in_channels equals out_channels. The branch ``linear`` is for linear layers
    and for 1 x 1 convolutions with more than one channel per group. Stride, padding and dilation do
    not matter. The same holds for subclasses, as long as they compute with their ``weight`` alone.

    Args:
        module: a layer of the student, and not of the dynamic teacher, where in_channels and
            out_channels may be equal though they differ in the student, and the reverse.
        names: branches, as `branch_names` returns them.

    Returns:
        The names of the selected branches, in the order given.
    """
    if isinstance(module, nn.Linear):
        return tuple(name for name in names if name == "linear")
    if not isinstance(module, nn.Conv2d):
        return ()
    if module.kernel_size == (1, 1):
        several = module.groups < min(module.in_channels, module.out_channels)
        return tuple(name for name in names if name == "linear" and several)
    if min(module.kernel_size) < 3:
        return ()
    square = module.in_channels == module.out_channels
    return tuple(n for n in names if n != "linear" and (n != "identity" or square))
