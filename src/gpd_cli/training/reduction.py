"""Averaging of gradients over processes, for layers with branches.

DistributedDataParallel averages the gradient of every parameter. For layers with branches it is
cheaper to average the gradient of the merged kernel, from which the gradients of the main kernel
and of the branches are then computed. Such parameters are hidden from DistributedDataParallel.
"""

from __future__ import annotations

from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.pair import Pair


def average_merged_kernels(pair: Pair, batches: int = 1) -> list[str]:
    """Make a pair average the gradients of merged kernels over processes, where that is cheaper.

    The pair averages in every backward pass, while DistributedDataParallel averages once per
    update. For each layer, the way that sends fewer numbers per update is chosen.

    Args:
        pair: student and dynamic teacher.
        batches: number of backward passes per update (gradient accumulation).

    Returns:
        Names of the pair's parameters whose gradients the pair averages itself, so that
        DistributedDataParallel has to leave them out.
    """
    names = []
    for name, module in pair.named_modules():
        if isinstance(module, SharedKernel) and module.branches is not None:
            # torch.nn.utils.parametrize stores the main kernel, as `original`, beside the module.
            main = f"{name.rpartition('.')[0]}.original"
            kernel = pair.get_parameter(main).numel()
            branches = sum(parameter.numel() for parameter in module.parameters())
            if batches * kernel < kernel + branches:
                module.averages_gradient = True
                names += [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
                names.append(main)
    return names
