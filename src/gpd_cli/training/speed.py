"""Options that change the speed of a training step but not the step's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from gpd_cli.distill.distillation import Distillation
from gpd_cli.distributed.world import world_size
from gpd_cli.errors import ModelError
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair

Given = ParamSpec("Given")
Result = TypeVar("Result")


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

    def set_memory_format(self, network: Pair | Alone, distillation: Distillation | None) -> None:
        """Set the memory format, in place.

        To be called before DistributedDataParallel wraps the network: gradients are sent in the
        formats that the weights have then. If the formats change later, gradients of the first step
        (with find_unused_parameters of every step) reach wrong elements of the weights.

        Args:
            network: the trained network or pair.
            distillation: the distillation from static teachers; None without any.
        """
        if self.channels_last:
            for module in (network, *_frozen(distillation)):
                module.to(memory_format=torch.channels_last)

    def prepare(self, network: Pair | Alone, distillation: Distillation | None) -> None:
        """Compile, in place; the keys of state dicts do not change.

        A pair is compiled as a whole, with its hooks, so that merging and both networks form one
        graph. With several processes, or if the student runs a second time in the backward pass,
        the two networks are compiled separately; kernels are then merged outside the graphs, and
        are inputs of the graphs. Copies of a compiled network are not compiled.

        Args:
            network: the trained network or pair.
            distillation: the distillation from static teachers; None without any.
        """
        if self.compile:
            for module in (*_compiled_modules(network), *_frozen(distillation)):
                module.compile(backend=self._backend)

    def compiled(self, function: Callable[Given, Result]) -> Callable[Given, Result]:
        """Compile a function if compilation is switched on; otherwise return the same function.

        Args:
            function: a function of tensors.
        """
        return torch.compile(function, backend=self._backend) if self.compile else function

    @property
    def _backend(self) -> str:
        return self.compile if isinstance(self.compile, str) else "inductor"

    def arrange(self, images: Tensor) -> Tensor:
        """Convert images to the memory format of the kernels.

        Args:
            images: a batch of images, ``[B, C, H, W]``.
        """
        if not self.channels_last:
            return images
        return images.contiguous(memory_format=torch.channels_last)


def _frozen(distillation: Distillation | None) -> list[nn.Module]:
    """The networks of the static teachers."""
    return [] if distillation is None else [t.network for t in distillation.teachers]


def _compiled_modules(network: Pair | Alone) -> tuple[nn.Module, ...]:
    """The modules to compile, each into its own graph."""
    if isinstance(network, Pair):
        # torch.compile does not trace hooks on intermediate gradients, nor custom gradients under
        # DistributedDataParallel.
        one_by_one = network.recompute_student or world_size() > 1
        return (network.narrow, network.teacher) if one_by_one else (network,)
    return (network.network,)
