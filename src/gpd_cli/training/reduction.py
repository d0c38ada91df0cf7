"""What travels between the processes of a joint run.

DistributedDataParallel averages the gradient of each parameter. The parameters of layers with
branches are taken out of its hands: there the gradient of the merged kernel is averaged, before the
gradients of main kernel and branches are computed from it.
"""

from __future__ import annotations

from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.pair import Pair


def average_merged_kernels(pair: Pair) -> list[str]:
    """Make a pair average the gradients of its merged kernels over the processes.

    Args:
        pair: student and dynamic teacher.

    Returns:
        Names of the pair's parameters whose gradients are then averages already.
    """
    names = []
    for name, module in pair.named_modules():
        if isinstance(module, SharedKernel) and module.branches is not None:
            module.averages_gradient = True
            names += [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
            # The kernel's parametrizations are a list with the main kernel beside it.
            names.append(f"{name.rpartition('.')[0]}.original")
    return names
