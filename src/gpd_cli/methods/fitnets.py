"""FitNets: hints for thin deep nets (Romero et al., ICLR 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.errors import MethodError
from gpd_cli.features import Outputs, Places
from gpd_cli.methods.base import Batch, Method, check_weight
from gpd_cli.methods.maps import same_size
from gpd_cli.methods.precision import in_float32


def hint_loss(regressed: Tensor, hint: Tensor) -> Tensor:
    """Hint loss (Romero et al., ICLR 2015, arXiv 1412.6550, equation 3), as a mean.

    ``mean((r(student) - teacher)^2)``; of two sizes, the larger map is pooled to the smaller one.

    Args:
        regressed: the student's map after the regressor r, ``[B, C, H, W]``.
        hint: the teacher's map, ``[B, C, H', W']``.

    Returns:
        A scalar.
    """
    return F.mse_loss(*same_size(in_float32(regressed), in_float32(hint)))


class FitNets(Method):
    """Hints: a 1 x 1 convolution of the network's map has to give the teacher's.

    The hint is given along the whole training and not in a phase of its own before it.

    Args:
        stage: whose maps are compared, 1 for the shallowest; by default the middle one.
        weight: of the loss; 100 is what the literature compares with on CIFAR-100.
    """

    needs = frozenset({"stages"})

    def __init__(self, stage: int | None = None, weight: float = 100.0) -> None:
        super().__init__()
        check_weight(weight)
        if stage is not None and stage < 1:
            raise MethodError(f"Stages are counted from 1, so there is no stage {stage}.")
        self.stage, self.weight = stage, weight
        self._index = 0

    def build(self, network: Places, teacher: Places) -> None:
        """Make the regressor.

        Raises:
            MethodError: when there is no such stage, or numbers of stages differ.
        """
        self.same_stages(network, teacher)
        count = len(network.stages)
        stage = (count + 1) // 2 if self.stage is None else self.stage
        if stage > count:
            raise MethodError(
                f"There is no stage {stage} to take a hint from: the networks have {count}."
            )
        self._index = stage - 1
        self.regressor = nn.Conv2d(
            network.stages[self._index].channels, teacher.stages[self._index].channels, 1
        )

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `hint_loss`; labels are not used."""
        maps = network.stages[self._index].to(self.regressor.weight.dtype)
        return self.weight * hint_loss(self.regressor(maps), teacher.stages[self._index])
