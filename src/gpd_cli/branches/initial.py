"""Initial values of branches: the tensors of each branch, and the gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.branches.merge import FILTERED_BRANCHES, weight_size
from gpd_cli.branches.names import MAIN_GATE, BranchInit

MULTIPLIER = 8
"""Outputs per input channel of the depthwise layer in the depthwise-separable branch (OREPA)."""

EXPANSION_RATE = 1
"""Number of inner channels of the ExpandNets branch, relative to the layer's own channels.

In the paper of ExpandNets this rate is 4, which takes 16 times the kernel's memory. It is 1 here,
since the dynamic teacher's layer is already wider than the student's layer.
"""

DEPTHWISE_EXPANSION_RATE = 4
"""The expansion rate of depthwise convolutions, whose factors would be single numbers at rate 1."""

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

Branches that OREPA does not have get the gates of similar ones: branches of a single layer get the
gate of OREPA's 1 x 1 branch, and products of layers the gate of OREPA's products. The gate of the
identity, which has no weights to train, starts at 0.
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
        name: name of the branch, or of the gate on the main kernel.
        init: kind of initial values: ``zero``, ``orepa``, or ``gpd`` for those of the paper's
            authors.
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
    """Make the initial tensors of one branch.

    Each tensor starts as the weight of a new convolution: as `torch.nn.Conv2d` initializes it, or,
    for ``orepa`` and in the authors' block, with Kaiming's gain for ReLU. A factor that starts as
    the identity is stored as its deviation from the identity, which starts at zero: the 1 x 1 layer
    of ``1x1_kxk`` (DBB, OREPA), the depthwise layer of ``do_conv`` (DO-Conv, Cao et al., 2020) and
    the square layer of ``linear``. As in OREPA, ``1x1_kxk`` has twice as many inner channels in
    layers of more than four groups, and its 1 x 1 layer starts as copies of the identity; the
    authors' block does not do this.

    Args:
        name: name of the branch.
        kernel_shape: shape of the main kernel, ``[O, I/g, kh, kw]``, or ``[O, I]``.
        groups: number of groups of the convolution.
        init: kind of initial values: ``zero``, ``orepa``, or ``gpd`` for those of the paper's
            authors.
        width: number of inner channels of ``1x1_kxk``, relative to the usual number. If it is not
            1, the 1 x 1 layer cannot start as the identity, and starts as a new convolution.
        authors: whether the branch is one of the authors' block, see
            `gpd_cli.branches.AUTHORS_BRANCHES`.
        device: device of the result.
        dtype: dtype of the result.
        generator: random generator; None for torch's global one.

    Returns:
        The branch's tensors by name (see `gpd_cli.branches.branch_kernel`).
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
            # The filter spreads each weight over the kh x kw window, so weights start as small as
            # in a k x k convolution.
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
