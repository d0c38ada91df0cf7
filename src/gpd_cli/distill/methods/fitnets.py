"""FitNets: hints for thin deep nets (Romero et al., ICLR 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs, Stage
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.maps import same_size
from gpd_cli.distill.precision import in_float32
from gpd_cli.errors import MethodError


def hint_loss(regressed: Tensor, hint: Tensor) -> Tensor:
    """Hint loss (Romero et al., ICLR 2015, arXiv 1412.6550, equation 3), as a mean.

    ``mean((r(student) - teacher)^2)``. Maps of different sizes are pooled to the smaller size.

    Args:
        regressed: the student's map after the regressor r, ``[B, C, H, W]``.
        hint: the teacher's map, ``[B, C, H', W']``.

    Returns:
        A scalar.
    """
    return F.mse_loss(*same_size(in_float32(regressed), in_float32(hint)))


def regressor(ours: Stage, theirs: Stage) -> nn.Sequential:
    """Make the regressor, which maps the trained network's map to the teacher's channels.

    It consists of a convolution, a norm and a ReLU. As in the CIFAR-100 literature (Tian et al.,
    ICLR 2020), the convolution is 1 x 1 for maps of equal size, 3 x 3 of stride 2 for maps of twice
    the teacher's size, and a transposed 4 x 4 of stride 2 for maps of half the teacher's size. For
    all other sizes it is 1 x 1, and `hint_loss` pools the maps. Sizes are those for images that
    each network was made for.

    Args:
        ours: stage of the trained network.
        theirs: stage of the static teacher.
    """
    channels = (ours.channels, theirs.channels)
    convolution: nn.Module
    if ours.height == 2 * theirs.height:
        convolution = nn.Conv2d(*channels, 3, stride=2, padding=1)
    elif 2 * ours.height == theirs.height:
        convolution = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    else:
        convolution = nn.Conv2d(*channels, 1)
    return nn.Sequential(convolution, nn.BatchNorm2d(theirs.channels), nn.ReLU())


class FitNets(Method):
    """FitNets: a feature map of the network, after a `regressor`, is to equal the teacher's map.

    This hint is part of the loss during the whole training, as in the tables of the CIFAR-100
    literature, and not only in a first phase.

    Args:
        stage: the stage whose maps are compared, 1 for the shallowest; by default the middle one.
        weight: weight of the loss; 100 is the value of the CIFAR-100 literature.
    """

    needs = frozenset({"stages"})

    def __init__(self, stage: int | None = None, weight: float = 100.0) -> None:
        super().__init__()
        check_weight(weight)
        if stage is not None and stage < 1:
            raise MethodError(f"The stage of FitNets must be 1 or more, not {stage}.")
        self.stage, self.weight = stage, weight
        self._index = 0

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Make the regressor.

        Raises:
            MethodError: when the stage does not exist, or the numbers of stages differ.
        """
        self.same_stages(network, teacher)
        count = len(network.stages)
        stage = (count + 1) // 2 if self.stage is None else self.stage
        if stage > count:
            raise MethodError(
                f"FitNets cannot take stage {stage}, since the networks have {count} stages; lower "
                "--model.method.stage."
            )
        self._index = stage - 1
        self.regressor = regressor(network.stages[self._index], teacher.stages[self._index])

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `hint_loss`; labels are not used."""
        weight = next(self.regressor.parameters())
        maps = network.stages[self._index].to(weight.dtype)
        return self.weight * hint_loss(self.regressor(maps), teacher.stages[self._index])
