"""What travels between the processes of a joint run.

DistributedDataParallel averages the gradient of each parameter. The parameters of layers with
branches are taken out of its hands: there the gradient of the merged kernel is averaged, before the
gradients of main kernel and branches are computed from it.
"""

from __future__ import annotations

from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.pair import Pair


def average_merged_kernels(pair: Pair, batches: int = 1) -> list[str]:
    """Make a pair average the gradients of its merged kernels over the processes.

    This happens in every backward pass, and DistributedDataParallel averages once per update. Of
    each layer the gradients are chosen of which fewer numbers travel.

    Args:
        pair: student and dynamic teacher.
        batches: backward passes of an update (accumulated gradients).

    Returns:
        Names of the pair's parameters whose gradients are then averages already.
    """
    names = []
    for name, module in pair.named_modules():
        if isinstance(module, SharedKernel) and module.branches is not None:
            # The kernel's parametrizations are a list with the main kernel beside it.
            main = f"{name.rpartition('.')[0]}.original"
            kernel = pair.get_parameter(main).numel()
            branches = sum(parameter.numel() for parameter in module.parameters())
            if batches * kernel < kernel + branches:
                module.averages_gradient = True
                names += [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
                names.append(main)
    return names
