"""Options that change the speed of a step, and not its result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpd_cli.distill.distillation import Distillation
from gpd_cli.errors import ModelError
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair


@dataclass(frozen=True)
class Speed:
    """Memory format and compilation of the trained network and the static teachers.

    Args:
        channels_last: keep kernels and images in channels-last memory format.
        compile: compile with `torch.compile`; True, or the name of a backend.

    Raises:
        ModelError: when torch has no such backend.
    """

    channels_last: bool = False
    compile: bool | str = False

    def __post_init__(self) -> None:
        if isinstance(self.compile, str):
            known = torch.compiler.list_backends(exclude_tags=())
            if self.compile not in known:
                raise ModelError(
                    f"torch.compile has no backend '{self.compile}'; set --model.compile to true, "
                    f"false or one of {', '.join(known)}."
                )

    def prepare(self, network: Pair | Alone, distillation: Distillation | None) -> None:
        """Set the memory format and compile, in place: state-dict keys do not change.

        Each network is compiled as a whole, with its hooks; copies are not compiled. A pair's
        kernels are merged outside of the compiled networks, and are arguments of these.

        Args:
            network: the network that is trained.
            distillation: the distillation with the static teachers, if there are any.
        """
        frozen = [] if distillation is None else [t.network for t in distillation.teachers]
        if self.channels_last:
            for module in (network, *frozen):
                module.to(memory_format=torch.channels_last)
        if self.compile:
            backend = self.compile if isinstance(self.compile, str) else "inductor"
            for module in (*_parts(network), *frozen):
                module.compile(backend=backend)

    def arrange(self, images: Tensor) -> Tensor:
        """The images in the memory format of the kernels.

        Args:
            images: ``[B, C, H, W]``.
        """
        if not self.channels_last:
            return images
        return images.contiguous(memory_format=torch.channels_last)


def _parts(network: Pair | Alone) -> tuple[nn.Module, ...]:
    if isinstance(network, Pair):
        return network.narrow, network.teacher
    return (network.network,)
