"""Initial values of branches: the tensors of each branch, and the gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.branches.merge import FILTERED_BRANCHES, weight_size
from gpd_cli.branches.names import MAIN_GATE, BranchInit

MULTIPLIER = 8
"""Outputs per channel of the depthwise half of the depthwise-separable branch (OREPA)."""

EXPANSION_RATE = 1
"""Inner width of the ExpandNets branch, in units of the layer's own width.

The paper's rate is 4, at 16 times the kernel's memory; relative to the student, the layer is
expanded already. For depthwise convolutions, whose factors would be single numbers at rate 1, the
rate is the paper's (`DEPTHWISE_EXPANSION_RATE`).
"""

DEPTHWISE_EXPANSION_RATE = 4

OREPA_GATES = {
    "1x1": 1.0,
    "1x1_kxk": 0.5,
    "1x1_avg": 0.25,
    "frequency": 0.0,
    "depthwise_separable": 0.5,
    "kxk_2": 1.0,
    "1xk": 1.0,
    "kx1": 1.0,
    "identity": 0.0,
    "do_conv": 0.5,
    "expandnet": 0.5,
    "linear": 0.5,
}
"""Initial gates of OREPA (class ``OREPA`` of its code, and ``OREPA_1x1`` for ``linear``).

Branches that OREPA does not have start as similar ones: a single layer as OREPA's 1 x 1, a product
of layers as OREPA's products. The identity, which has no weights to train, starts at 0.
"""

AUTHORS_GATES = {
    MAIN_GATE: 0.25,
    "1x1_avg": 0.25,
    "frequency": 0.0,
    "1x1_kxk": 0.5,
    "kxk_2": 0.05,
    "depthwise_separable": 0.5,
}
"""Initial gates in the code of the paper's authors, for training from scratch."""


def initial_gate(name: str, init: BranchInit = "zero") -> float:
    """The initial value of a branch's gate.

    Args:
        name: the branch.
        init: the initial values: ``zero``, ``orepa``, or ``gpd`` for those of the paper's authors.
    """
    if init == "zero":
        return float(name == MAIN_GATE)
    return (AUTHORS_GATES if init == "gpd" else OREPA_GATES)[name]


def initial_parameters(
    name: str,
    kernel_shape: Sequence[int],
    groups: int,
    *,
    init: BranchInit = "zero",
    width: float = 1.0,
    authors: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Initial tensors of one branch.

    Each tensor starts as the weight of a convolution: as `torch.nn.Conv2d` initializes it, or, for
    ``orepa`` and in the authors' block, with Kaiming's gain for ReLU. A factor that starts as the
    identity is stored as its deviation from the identity, which is zero: the first half of
    ``1x1_kxk`` (DBB, OREPA), the depthwise half of ``do_conv`` (DO-Conv, Cao et al., 2020) and the
    square half of ``linear``. As in OREPA, ``1x1_kxk`` with more than four groups has twice the
    inner width and starts as copies of the identity, though not in the authors' block.

    Args:
        name: the branch.
        kernel_shape: shape of the main kernel, ``[O, I/g, kh, kw]``, or ``[O, I]``.
        groups: groups of the convolution.
        init: the initial values: ``zero``, ``orepa``, or ``gpd`` for those of the paper's authors.
        width: inner channels of ``1x1_kxk`` in units of the usual ones. With another number of
            them than 1 there is no identity to start from, and the first half starts as a
            convolution.
        authors: whether the branch is one of the authors' block, see
            `gpd_cli.branches.AUTHORS_BRANCHES`.
        device: device of the result.
        dtype: dtype of the result.
        generator: random generator; None for torch's global one.

    Returns:
        The tensors by name (see `gpd_cli.branches.branch_kernel`).
    """
    out_channels, fan, *size = kernel_shape
    # OREPA's 1 x 1 block has a gain of 1, its k x k block a gain of sqrt(2).
    plain = init == "zero" and not authors
    slope = 5**0.5 if plain else float(name == "linear")

    def conv(*shape: int) -> Tensor:
        source = "cpu" if generator is None else generator.device
        weight = torch.empty(shape, device=source, dtype=dtype)
        return nn.init.kaiming_uniform_(weight, a=slope, generator=generator).to(device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    if name in FILTERED_BRANCHES:
        weight = conv(out_channels, fan, *weight_size(name, size))
        if name == "frequency" and plain:
            # The filter spreads a weight over the window, so it starts as small as a k x k tap.
            weight /= (size[0] * size[1]) ** 0.5
        return {"weight": weight}
    match name:
        case "kxk_2":
            return {"weight": conv(out_channels, fan, *size)}
        case "1x1_kxk":
            inner = fan if groups <= 4 or authors else 2 * fan
            if width != 1:
                inner = max(1, round(width * inner))
                first = conv(groups * inner, fan, 1, 1)
                return {"first": first, "weight": conv(out_channels, inner, *size)}
            return {
                "deviation": zeros(groups * inner, fan, 1, 1),
                "weight": conv(out_channels, inner, *size),
            }
        case "depthwise_separable":
            return {
                "depthwise": conv(groups * fan * MULTIPLIER, 1, *size).view(-1, MULTIPLIER, *size),
                "weight": conv(out_channels, fan * MULTIPLIER, 1, 1),
            }
        case "do_conv":
            return {
                "deviation": zeros(groups * fan, size[0] * size[1], *size),
                "weight": conv(out_channels, fan, *size),
            }
        case "expandnet":
            rate = DEPTHWISE_EXPANSION_RATE if fan == 1 else EXPANSION_RATE
            last = rate * (out_channels // groups)
            return {
                "first": conv(groups * rate * fan, fan, 1, 1),
                "middle": conv(groups * last, rate * fan, *size),
                "weight": conv(out_channels, last, 1, 1),
            }
        case "linear":
            side = min(out_channels // groups, fan)
            return {
                "deviation": zeros(groups * side, side),
                "weight": conv(out_channels, fan, *size),
            }
    return {}
