"""The extra branches of one layer, as a module that merges them into the layer's kernel."""

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
    last bit; each weight starts as a convolution's, so that the gates have gradients from the first
    step. With ``orepa``, gates and weights start as OREPA's, and `absorb` gives the main kernel
    with which the merged kernel is the wanted one. With ``gpd`` the authors' block starts as in the
    authors' code, and the merged kernel is the sum of its branches.

    Only in the authors' block has the main kernel a gate. OREPA's gate on the main kernel (1/4 at
    the start) leaves room for the other branches; here `absorb` does. Otherwise such a gate would
    rescale the learning rate of the stored kernel, and the student's weights would no longer be a
    block of the stored kernel.

    State-dict keys are ``gates.<branch>`` and ``weights.<branch>.<tensor>``.

    Args:
        kernel_shape: shape of the main kernel, ``[O, I/g, kh, kw]``, or ``[O, I]`` for a linear
            layer.
        groups: groups of the convolution.
        names: the extra branches, as `branch_names` returns them.
        init: initial values of gates and weights.
        width: inner channels of ``1x1_kxk``, see `gpd_cli.expand`.
        channels: ``[O]``, for the identity branch: the input channel within the group that each
            output copies; by default the input channel in the same position.
        device: device of the parameters.
        dtype: dtype of the parameters.
        generator: random generator of the initial weights, which do not depend on ``device``.

    Raises:
        GpdError: when there is no branch of some name.

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
        # No buffer: averaging of weights averages buffers, too, and would round indices down.
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
            with torch.inference_mode(False):  # a later backward pass may need the indices
                self.channels = self.channels.to(kernel.device)
            parameters["identity"] = {"channels": self.channels}
        gates = {name: self.gates[name] for name in self.names}
        return merge(kernel, gates, parameters, self.filters, self.groups)

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """The trainable tensors of each branch, by name."""
        return {name: dict(weights.named_parameters()) for name, weights in self.weights.items()}

    @torch.no_grad()
    def absorb(self, wanted: Tensor) -> Tensor:
        """The main kernel that merges to a wanted kernel: the latter less all gated branches.

        Args:
            wanted: the wanted merged kernel, ``[O, I/g, kh, kw]``, or ``[O, I]``.

        Returns:
            A tensor of the same shape, which merges to the wanted kernel up to rounding, and to
            the last bit where all gates are zero.
        """
        extra_branches: Tensor = self(torch.zeros_like(wanted))
        return wanted - extra_branches

    def is_silent(self) -> bool:
        """Whether the gates leave the main kernel as it is, to the last bit."""
        return not any(
            bool((gate - float(name == MAIN_GATE)).any()) for name, gate in self.gates.items()
        )

    def extra_repr(self) -> str:
        """The branches, for ``print``."""
        return f"{', '.join(self.names)}, groups={self.groups}"
