"""The extra branches of one layer, as a module that merges them into the layer's kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.branches.initial import initial_gate, initial_parameters
from gpd_cli.branches.merge import merge, spatial_filters
from gpd_cli.branches.names import MAIN_GATE, BranchInit, branch_names


class BranchBank(nn.Module):
    """Weights and gates of the extra branches that are merged into one kernel.

    With ``init`` ``zero``, gates start at zero, so that the merged kernel is the main kernel to the
    last bit; the weights start as in a new convolution, so that the gates have gradients from the
    first step. With ``orepa``, gates and weights start as OREPA's; `absorb` then returns the
    main kernel that merges to a wanted kernel. With ``gpd`` the authors' block starts as in the
    authors' code, and the merged kernel is the sum of its branches.

    Only the authors' block has a gate on the main kernel. In OREPA this gate is 1/4 at the start,
    to leave room for the other branches; here `absorb` subtracts them from the main kernel instead.
    A gate would rescale the learning rate of the stored kernel, and the student's weights would no
    longer be a block of the stored kernel.

    State-dict keys are ``gates.<branch>`` and ``weights.<branch>.<tensor>``.

    Args:
        kernel_shape: shape of the main kernel, ``[O, I/g, kh, kw]``, or ``[O, I]`` for a linear
            layer.
        groups: number of groups of the convolution.
        names: the extra branches, as `branch_names` returns them.
        init: initial values of gates and weights.
        width: number of inner channels of the ``1x1_kxk`` branch, see `gpd_cli.expand`.
        channels: for the identity branch, the input channel within the group that each output
            copies, ``[O]``; by default the input channel in the same position.
        device: device of the parameters.
        dtype: dtype of the parameters.
        generator: random generator of the initial weights, which do not depend on ``device``.

    Raises:
        GpdError: when there is no branch of one of the names.

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
        init: BranchInit = "zero",
        width: float = 1.0,
        channels: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.names = branch_names(names)
        self.is_authors = MAIN_GATE in self.names
        out_channels, fan, *kernel_size = kernel_shape
        self.gates = nn.ParameterDict()
        self.weights = nn.ModuleDict()
        for name in self.names:
            gate = torch.full((out_channels,), initial_gate(name, init), device=device, dtype=dtype)
            self.gates[name] = nn.Parameter(gate)
            if name == MAIN_GATE:
                continue
            tensors = initial_parameters(
                name,
                kernel_shape,
                groups,
                init=init,
                width=width,
                authors=self.is_authors,
                device=device,
                dtype=dtype,
                generator=generator,
            )
            self.weights[name] = nn.ParameterDict(tensors)
        filters = spatial_filters(self.names, out_channels, kernel_size, dtype=dtype, device=device)
        # The filters are constants of the layer, not state: they stay out of checkpoints.
        self.register_buffer("filters", filters, persistent=False)
        if "identity" not in self.names:
            channels = None
        elif channels is None:
            channels = torch.arange(out_channels) % fan
        # The indices are no buffer: averaging of weights (EMA) averages buffers, too, and would
        # round the indices down.
        self.channels = channels

    def forward(self, kernel: Tensor) -> Tensor:
        """Merge the branches into the main kernel.

        Args:
            kernel: the main kernel, ``[O, I/g, kh, kw]``, or ``[O, I]``.

        Returns:
            The merged kernel, of the same shape, dtype and memory format.
        """
        parameters = self.factors()
        if self.channels is not None:
            with torch.inference_mode(False):  # a later backward pass may need the indices
                self.channels = self.channels.to(kernel.device)
            parameters["identity"] = {"channels": self.channels}
        gates = {name: self.gates[name] for name in self.names}
        return merge(kernel, gates, parameters, self.filters, self.groups)

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """The weights of each branch by name, by branch name; gates are not included."""
        return {name: dict(weights.named_parameters()) for name, weights in self.weights.items()}

    @torch.no_grad()
    def absorb(self, wanted: Tensor) -> Tensor:
        """Subtract all gated branches from a kernel, so that merging gives this kernel again.

        Args:
            wanted: the wanted merged kernel, ``[O, I/g, kh, kw]``, or ``[O, I]``.

        Returns:
            The main kernel that merges to the wanted kernel, of the same shape: up to rounding, and
            to the last bit where all gates are zero.
        """
        extra_branches: Tensor = self(torch.zeros_like(wanted))
        return wanted - extra_branches

    def is_silent(self) -> bool:
        """Whether the gates leave the main kernel unchanged to the last bit.

        This is so if the gates of all branches are zero, and a gate on the main kernel is one.
        """
        return not any(
            bool((gate - float(name == MAIN_GATE)).any()) for name, gate in self.gates.items()
        )

    def extra_repr(self) -> str:
        """The names of the branches and the number of groups, for ``print``."""
        return f"{', '.join(self.names)}, groups={self.groups}"
