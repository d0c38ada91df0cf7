"""The extra branches of one convolution, as a module that merges them into its kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.branches.functional import merge, spatial_filters
from gpd_cli.branches.names import branch_names

MULTIPLIER = 8
"""Outputs per channel of the depthwise half of the depthwise-separable branch (OREPA)."""


def accepts_branches(module: nn.Module) -> bool:
    """Whether a layer gets branches: a 2-D convolution with a kernel of 3 x 3 or larger.

    Stride, padding, dilation and groups do not matter, and neither does a subclass that computes
    with its ``weight`` alone.

    Args:
        module: any layer.
    """
    return isinstance(module, nn.Conv2d) and min(module.kernel_size) >= 3


class BranchBank(nn.Module):
    """Parameters and gates of the extra branches that are merged into one kernel.

    Gates start at zero, so that the merged kernel is the main kernel to the last bit; the weights
    start as those of a convolution of their own would, so that a gate has a gradient from the
    first step. State-dict keys are ``gates.<branch>`` and ``weights.<branch>.<tensor>``.

    Args:
        kernel_shape: shape of the main kernel, ``[O, I/g, kh, kw]``.
        groups: groups of the convolution.
        names: the extra branches, as `branch_names` returns them.
        device: of the parameters.
        dtype: of the parameters.
        generator: source of the initial weights; they do not depend on ``device``.

    Raises:
        GpdError: when a name is no branch's.

    Example:
        >>> bank = BranchBank((8, 4, 3, 3), 1, branch_names(6))
        >>> kernel = torch.randn(8, 4, 3, 3)
        >>> torch.equal(bank(kernel), kernel)
        True
    """

    filters: Tensor

    def __init__(
        self,
        kernel_shape: Sequence[int],
        groups: int,
        names: Sequence[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.names = branch_names(names)
        out_channels, _, *kernel_size = kernel_shape
        self.gates = nn.ParameterDict()
        self.weights = nn.ModuleDict()
        for name in self.names:
            self.gates[name] = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))
            tensors = initial_parameters(
                name, kernel_shape, groups, device=device, dtype=dtype, generator=generator
            )
            self.weights[name] = nn.ParameterDict(tensors)
        filters = spatial_filters(self.names, out_channels, kernel_size, dtype=dtype, device=device)
        # A constant of the shape, not state: it stays out of checkpoints.
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, kernel: Tensor) -> Tensor:
        """Merge the branches into the main kernel.

        Args:
            kernel: ``[O, I/g, kh, kw]``.

        Returns:
            The merged kernel, of the same shape, dtype and memory layout.
        """
        parameters = {name: dict(self.weights[name].named_parameters()) for name in self.names}
        gates = {name: self.gates[name] for name in self.names}
        return merge(kernel, gates, parameters, self.filters, self.groups)

    def extra_repr(self) -> str:
        """The branches, for ``print``."""
        return f"{', '.join(self.names)}, groups={self.groups}"


def initial_parameters(
    name: str,
    kernel_shape: Sequence[int],
    groups: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Initial tensors of one branch, each initialized like `torch.nn.Conv2d` does its weight.

    The exception is the first half of ``1x1_kxk``, which starts as the identity (DBB, OREPA); its
    inner width is the full input width.

    Args:
        name: the branch.
        kernel_shape: shape of the main kernel, ``[O, I/g, kh, kw]``.
        groups: groups of the convolution.
        device: of the result.
        dtype: of the result.
        generator: source of the random numbers.

    Returns:
        Per name of a tensor (see `gpd_cli.branches.functional`), the tensor.
    """
    out_channels, fan, kh, kw = kernel_shape

    def conv(*shape: int) -> Tensor:
        source = "cpu" if generator is None else generator.device
        weight = torch.empty(shape, device=source, dtype=dtype)
        return nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator).to(device)

    match name:
        case "1x1_kxk":
            identity = torch.eye(fan, device=device, dtype=dtype).repeat(groups, 1)
            return {
                "pointwise": identity[:, :, None, None].contiguous(),
                "weight": conv(out_channels, fan, kh, kw),
            }
        case "depthwise_separable":
            depthwise = conv(groups * fan * MULTIPLIER, 1, kh, kw)
            return {
                "depthwise": depthwise.view(-1, MULTIPLIER, kh, kw),
                "weight": conv(out_channels, fan * MULTIPLIER, 1, 1),
            }
        case "frequency":
            # The filter spreads a weight over the window: as small as the taps of a k x k kernel.
            return {"weight": conv(out_channels, fan, 1, 1) / (kh * kw) ** 0.5}
        case "1xk":
            return {"weight": conv(out_channels, fan, 1, kw)}
        case "kx1":
            return {"weight": conv(out_channels, fan, kh, 1)}
    return {"weight": conv(out_channels, fan, 1, 1)}
