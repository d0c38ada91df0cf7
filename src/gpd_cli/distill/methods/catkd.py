"""Class attention transfer (Guo et al., CVPR 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.maps import pool_to
from gpd_cli.distill.precision import full_precision, in_float32
from gpd_cli.errors import MethodError


def class_activation(maps: Tensor, weight: Tensor, resolution: int = 2) -> Tensor:
    """Compute class activation maps, pooled to a small size.

    Where global pooling and a linear classifier follow a map, the classifier applied at a position
    gives the activation of each class there. The mean over the positions is the logit without the
    bias.

    Args:
        maps: feature maps, ``[B, F, H, W]``.
        weight: the classifier's weight, ``[C, F]``.
        resolution: height and width of the result.

    Returns:
        The pooled maps, one for each class, ``[B, C, resolution, resolution]``.
    """
    maps, weight = in_float32(maps), in_float32(weight)
    with full_precision(maps):
        # The feature maps are pooled first: this gives the same result at less cost.
        return torch.einsum("cf,bfhw->bchw", weight, pool_to(maps, (resolution, resolution)))


def class_attention_loss(student: Tensor, teacher: Tensor, normalize: bool = True) -> Tensor:
    """Class attention transfer (Guo et al., CVPR 2023, section 3.3).

    ``mean((a_s / |a_s| - a_t / |a_t|)^2)``, with the class activation maps a_s of the student and
    a_t of the teacher for each image and class.

    Args:
        student: pooled class activation maps, ``[B, C, n, n]``.
        teacher: pooled class activation maps, ``[B, C, n, n]``.
        normalize: whether each map is divided by its norm.

    Returns:
        A scalar.
    """
    student, teacher = student.flatten(2), teacher.flatten(2)
    if normalize:
        student, teacher = F.normalize(student, dim=2), F.normalize(teacher, dim=2)
    return F.mse_loss(student, teacher)


class CATKD(Method):
    """Class attention transfer: the student learns where in an image the teacher sees each class.

    Args:
        resolution: height and width of the class activation maps, 2 or more (4 in the authors'
            ImageNet runs).
        normalize: whether each map is divided by its norm. The authors normalize where attention is
            the only loss. Their runs that also learn from labels do not normalize, and have weights
            between 0.5 and 15.
        weight: weight of the loss; the default is the authors' value with normalization.
    """

    needs = frozenset({"pooled", "embedding"})

    def __init__(self, resolution: int = 2, normalize: bool = True, weight: float = 50.0) -> None:
        super().__init__()
        check_weight(weight)
        if resolution < 2:
            raise MethodError(f"The resolution of CATKD must be 2 or more, not {resolution}.")
        self.resolution, self.normalize, self.weight = resolution, normalize, weight

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check that the input of each classifier is the mean of a map; nothing is trained.

        Raises:
            MethodError: when there is no such map, or another module is named as the stage.
        """
        for info, which, option in (
            (network, "trained network", "stages"),
            (teacher, "static teacher", "static_teacher.stages"),
        ):
            last = info.stages[-1] if info.stages else None
            if last is None or last.channels != info.embedding or last.positions == 1:
                raise MethodError(
                    "CATKD needs the feature map whose mean is the input of the classifier, as the "
                    f"output of the last stage of the {which}; make this map a module's output and "
                    f"name the module last in --model.{option}, or choose another method on "
                    "feature maps, such as ReviewKD."
                )

    def check_maps(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check that maps have more than one position, so that there are places to compare.

        Raises:
            MethodError: when a map has a single position.
        """
        for info, which in ((network, "trained network"), (teacher, "static teacher")):
            if info.stages and info.stages[-1].positions == 1:
                raise MethodError(
                    "CATKD compares positions in the last feature map, but at this image size the "
                    f"map of the {which} has a single position; raise --data.image_size, or choose "
                    "a method on logits, such as DKD."
                )

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `class_activation` and `class_attention_loss`; labels are not used."""
        ours, theirs = self._activation(network), self._activation(teacher)
        return self.weight * class_attention_loss(ours, theirs, self.normalize)

    def _activation(self, outputs: Outputs) -> Tensor:
        assert outputs.weight is not None
        return class_activation(outputs.stages[-1], outputs.weight, self.resolution)
