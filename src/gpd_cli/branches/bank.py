"""The extra branches of one layer, as a module that merges them into its kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.branches.initial import initial_gate, initial_parameters
from gpd_cli.branches.merge import merge, spatial_filters
from gpd_cli.branches.names import MAIN_GATE, BranchInit, branch_names


class BranchBank(nn.Module):
    """Parameters and gates of the extra branches that are merged into one kernel.

    With ``init`` ``zero``, gates start at zero, so that the merged kernel is the main kernel to the
    last bit; the weights start as those of a convolution of their own would, so that a gate has a
    gradient from the first step. With ``orepa``, gates and weights start as OREPA's do, and
    `absorb` gives the main kernel with which the sum is what it has to be. With ``gpd`` the
    authors' block starts as in their code, and the merged kernel is what it comes to.

    The main kernel has no gate, but for the authors' block. OREPA's (which starts at 1/4) scales a
    random kernel down to what the other branches leave it; here `absorb` decides that. For the rest
    it would be a second factor of what is stored, which rescales its learning rate, and a student
    whose weights are no longer a block of what is stored.

    State-dict keys are ``gates.<branch>`` and ``weights.<branch>.<tensor>``.

    Args:
        kernel_shape: shape of the main kernel, ``[O, I/g, kh, kw]``, or ``[O, I]`` for a linear
            layer.
        groups: groups of the convolution.
        names: the extra branches, as `branch_names` returns them.
        init: where gates and weights start.
        channels: ``[O]``, for the identity branch: the input channel within its group that each
            output hands on; by default the one at its own place.
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
        init: BranchInit = "zero",
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
                authors=self.is_authors,
                device=device,
                dtype=dtype,
                generator=generator,
            )
            self.weights[name] = nn.ParameterDict(tensors)
        filters = spatial_filters(self.names, out_channels, kernel_size, dtype=dtype, device=device)
        # A constant of the layer, not state: it stays out of checkpoints.
        self.register_buffer("filters", filters, persistent=False)
        if "identity" not in self.names:
            channels = None
        elif channels is None:
            channels = torch.arange(out_channels) % fan
        # No buffer: averaging of weights takes buffers along and would round these down.
        self.channels = channels

    def forward(self, kernel: Tensor) -> Tensor:
        """Merge the branches into the main kernel.

        Args:
            kernel: ``[O, I/g, kh, kw]``, or ``[O, I]``.

        Returns:
            The merged kernel, of the same shape, dtype and memory layout.
        """
        parameters = self.factors()
        if self.channels is not None:
            with torch.inference_mode(False):  # they may be saved for a backward pass later
                self.channels = self.channels.to(kernel.device)
            parameters["identity"] = {"channels": self.channels}
        gates = {name: self.gates[name] for name in self.names}
        return merge(kernel, gates, parameters, self.filters, self.groups)

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """Per branch, its trainable tensors by name."""
        return {name: dict(weights.named_parameters()) for name, weights in self.weights.items()}

    @torch.no_grad()
    def absorb(self, wanted: Tensor) -> Tensor:
        """The main kernel that merges to a wanted one: the wanted one less all gated branches.

        Args:
            wanted: ``[O, I/g, kh, kw]``, or ``[O, I]``.

        Returns:
            A tensor of the same shape; merged, it is the wanted one up to rounding, and to the
            last bit where all gates are zero.
        """
        return wanted - self(torch.zeros_like(wanted))

    def is_silent(self) -> bool:
        """Whether the gates leave the main kernel as it is, to the last bit."""
        return not any(
            bool((gate - float(name == MAIN_GATE)).any()) for name, gate in self.gates.items()
        )

    def extra_repr(self) -> str:
        """The branches, for ``print``."""
        return f"{', '.join(self.names)}, groups={self.groups}"
