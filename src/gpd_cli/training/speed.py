"""Options that change how fast a step is and not what it computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from gpd_cli.errors import ModelError
from gpd_cli.expansion import Pair
from gpd_cli.training.networks import Alone


def compile_networks(
    network: Pair | Alone, teachers: Iterable[nn.Module], backend: str = "inductor"
) -> None:
    """Compile student, dynamic teacher and static teachers, each as a whole, in place.

    A compiled module is the same object with the same keys, and its copies are not compiled.
    Kernels are merged outside of it: what is compiled takes them as inputs, and therefore once for
    all of training.

    Args:
        network: what is trained.
        teachers: the static teachers' networks.
        backend: of `torch.compile`.

    Raises:
        ModelError: when torch has no such backend.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ModelError(f"torch.compile has no backend '{backend}'; take true or one of: {known}.")
    trained = (
        [network.narrow, network.teacher] if isinstance(network, Pair) else [network.network]
    )
    for module in (*trained, *teachers):
        module.compile(backend=backend)


def to_channels_last(network: nn.Module) -> None:
    """Store kernels with their channels last, in place, which is how tensor cores take them.

    Args:
        network: whose kernels; images have to follow.
    """
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
