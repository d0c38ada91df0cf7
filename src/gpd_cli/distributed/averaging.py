"""Averaging of gradients over processes, for the merged kernels of layers with branches.

The gradients of all branches of a layer are linear functions of the gradient of the merged kernel,
and depend otherwise only on weights, which are the same in all processes. So it is exact to average
only the gradient of the merged kernel. With the paper's six branches, this gradient has less than a
third as many numbers as the gradients of all branches.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from gpd_cli.distributed.world import world_size


def averaged(gradient: Tensor, channels_last: bool = False) -> Tensor:
    """The mean of a gradient over all processes, which all have to call this function together.

    Args:
        gradient: this process's gradient, of any shape; with channels_last it has four axes.
        channels_last: whether to send the numbers in channels-last order. This has to be the same
            in all processes, while the memory formats of their gradients may differ.

    Returns:
        A new tensor in the chosen memory format; with a single process, the gradient itself.
    """
    if world_size() == 1:
        return gradient
    # If the gradient is in channels-last format, this permutation is a contiguous view.
    numbers = gradient.permute(0, 2, 3, 1) if channels_last else gradient
    # Divide before summing: in types such as float16, the sum may overflow where the mean does not.
    numbers = (numbers / world_size()).contiguous()
    dist.all_reduce(numbers)
    return numbers.permute(0, 3, 1, 2) if channels_last else numbers
