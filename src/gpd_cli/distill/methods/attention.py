"""Attention transfer (Zagoruyko and Komodakis, ICLR 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.maps import same_size
from gpd_cli.distill.precision import in_float32
from gpd_cli.errors import MethodError


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Activation-based attention transfer (Zagoruyko and Komodakis, 2017, arXiv 1612.03928).

    A stage's attention q is the sum of squares over channels, at each position. The loss is the sum
    over the stages of ``mean((q_s / |q_s| - q_t / |q_t|)^2)``. This is equation 2 up to the number
    of positions and a factor of a half, as in the authors' code. Maps of different sizes are pooled
    to the smaller size before squares are taken, as in the code behind the tables of the CIFAR-100
    literature (Tian et al., ICLR 2020).

    Args:
        student: the student's feature maps, each ``[B, C, H, W]``.
        teacher: the teacher's feature maps, the same number, each ``[B, C', H', W']``.

    Returns:
        A scalar.

    Example:
        >>> maps = torch.randn(2, 8, 4, 4)
        >>> bool(attention_loss([maps], [3 * maps]) < 1e-6)  # the scale of maps does not matter
        True
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        one, other = same_size(in_float32(ours), in_float32(theirs))
        losses.append(F.mse_loss(_attention(one), _attention(other)))
    return torch.stack(losses).sum()


class AT(Method):
    """Attention transfer.

    Args:
        weight: weight of the loss; 1000 is the authors' value.
    """

    needs = frozenset({"stages"})

    def __init__(self, weight: float = 1000.0) -> None:
        super().__init__()
        check_weight(weight)
        self.weight = weight

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check that both networks have the same number of stages; nothing is trained.

        Raises:
            MethodError: when the numbers of stages differ.
        """
        self.same_stages(network, teacher)

    def check_maps(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check that some stage has several positions to compare.

        After normalization the attention of a single position is equal in all networks.

        Raises:
            MethodError: when in every stage the maps, pooled to the smaller size, have a single
                position.
        """
        pairs = zip(network.stages, teacher.stages, strict=True)
        sizes = [(min(a.height, b.height), min(a.width, b.width)) for a, b in pairs]
        if all(size == (1, 1) for size in sizes):
            raise MethodError(
                "AT compares positions in feature maps, but at this image size every stage has a "
                "map of a single position; name shallower modules in --model.stages and "
                "--model.static_teacher.stages, or raise --data.image_size."
            )

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `attention_loss`; labels are not used."""
        return self.weight * attention_loss(network.stages, teacher.stages)


def _attention(maps: Tensor) -> Tensor:
    """The normalized attention of each image: means of squares over channels, ``[B, H * W]``."""
    return F.normalize(maps.square().mean(dim=1).flatten(1))
