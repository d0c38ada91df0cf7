"""Options that change how fast a step is, and not what it computes."""

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
    """Memory layout and compilation of what is trained and of the static teachers.

    Args:
        channels_last: keep kernels and images with their channels last.
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
        """Lay out and compile, in place: keys stay what they are, copies are not compiled.

        Each network is compiled as a whole, with the hooks in it. A pair's kernels are merged
        outside, and go in.

        Args:
            network: what is trained.
            distillation: with the static teachers, if there are any.
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
        """The images in the layout of the kernels.

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
