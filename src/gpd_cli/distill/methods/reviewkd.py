"""Distilling knowledge via knowledge review (Chen et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.maps import pool_to
from gpd_cli.distill.methods.pairs import ByPair, one_value
from gpd_cli.distill.precision import in_float32
from gpd_cli.errors import MethodError

_LEVELS = (4, 2, 1)
_WIDEST = 512


def context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of one stage (Chen et al., CVPR 2021, arXiv 2104.09044, 3.4).

    The weighted mean of the mean squared differences between the two maps as they are, and between
    the maps pooled to 4 x 4, 2 x 2 and 1 x 1 positions, as far as these sizes are smaller. The
    weights are 1, 1/2, 1/4 and 1/8, in this order.

    Args:
        student: the student's fused map, ``[B, C, H, W]``.
        teacher: the teacher's map, ``[B, C, H, W]``.

    Returns:
        A scalar.
    """
    student, teacher = in_float32(student), in_float32(teacher)
    levels = [level for level in _LEVELS if level < min(student.shape[-2:])]
    losses = [F.mse_loss(student, teacher)]
    losses += [F.mse_loss(pool_to(student, (n, n)), pool_to(teacher, (n, n))) for n in levels]
    weights = [0.5**k for k in range(len(losses))]
    weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return torch.stack(weighted).sum() / sum(weights)


def review_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Compute the sum of `context_loss` over the stages.

    Args:
        student: the student's fused map of each stage, ``[B, C, H, W]``.
        teacher: the teacher's map of each stage, of the same shape.

    Returns:
        A scalar.
    """
    losses = [context_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).sum()


class Fusion(nn.Module):
    """Attention-based fusion of a stage with the fused map of the deeper stages.

    As in section 3.3 of the paper, attention is computed from the two maps; each map is multiplied
    by its attention, position by position, and the two are added.

    Args:
        channels: number of channels of the stage.
        width: number of channels of the fused map.
        teacher_channels: number of channels of the teacher's map.
        deepest: whether this is the deepest stage, which is fused with nothing.
    """

    def __init__(self, channels: int, width: int, teacher_channels: int, deepest: bool) -> None:
        super().__init__()
        self.enter = _convolution(channels, width, 1)
        self.leave = _convolution(width, teacher_channels, 3)
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)

    def forward(
        self, maps: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Fuse the maps of this stage with the fused maps of the deeper stages.

        Args:
            maps: maps of the stage, ``[B, channels, H, W]``.
            deeper: fused map of the next deeper stage, ``[B, width, h, w]``; None for the deepest
                stage.
            size: height and width of the teacher's map.

        Returns:
            The map to compare with the teacher's map, ``[B, teacher_channels, *size]``, and the
            fused map for the next stage, ``[B, width, *size]``.
        """
        fused = self.enter(maps)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:], mode="nearest")
            weights = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()
            fused = fused * weights[:, :1] + deeper * weights[:, 1:]
        if fused.shape[-2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.leave(fused), fused


class ReviewKD(Method):
    """Knowledge review: the network's deeper stages help it to match the teacher's shallower ones.

    Args:
        width: number of channels of the fused maps. By default they have as many channels as the
            network's deepest features, 512 at most, as for the authors' CIFAR networks and
            ResNet-18 (256 for MobileNet V1 and RVT).
        use_embedding: whether the pooled features, the classifier's input, are compared as a last
            stage.
        student_preactivation: whether stages of student and dynamic teacher are taken before their
            activation; in the authors' runs on CIFAR-100 they are not.
        static_preactivation: whether stages of the static teacher are taken before their
            activation, as in the authors' runs on CIFAR-100; for a Wide ResNet these are the
            outputs of the norms that follow the stages.
        weight: weight of the loss. The authors choose it for each pair of teacher and student; a
            configuration may have a table for this, see ``configs/methods/reviewkd.yaml``.
    """

    needs = frozenset({"stages", "embedding"})

    def __init__(
        self,
        width: int | None = None,
        use_embedding: bool = True,
        student_preactivation: bool = False,
        static_preactivation: bool = True,
        weight: float | ByPair = 1.0,
    ) -> None:
        super().__init__()
        self.weight = one_value("weight", weight)
        check_weight(self.weight)
        if width is not None and width < 1:
            raise MethodError(f"The width of ReviewKD must be 1 or more, not {width}.")
        self.width, self.use_embedding = width, use_embedding
        self.student_preactivation = student_preactivation
        self.static_preactivation = static_preactivation
        self.fusions = nn.ModuleList()

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Make a `Fusion` for each stage.

        Raises:
            MethodError: when the numbers of stages differ, or a network has no embedding though
                `use_embedding` is set.
        """
        self.same_stages(network, teacher)
        ours, theirs = ([stage.channels for stage in p.stages] for p in (network, teacher))
        if self.use_embedding:
            if not (network.embedding and teacher.embedding):
                raise MethodError(
                    "ReviewKD also compares the inputs of the classifiers, but one of the networks "
                    "has no linear classifier; set --model.method.use_embedding false."
                )
            ours, theirs = [*ours, network.embedding], [*theirs, teacher.embedding]
        width = self.width or min(_WIDEST, ours[-1])
        self.fusions = nn.ModuleList(
            Fusion(channels, width, out, deepest=k == len(ours) - 1)
            for k, (channels, out) in enumerate(zip(ours, theirs, strict=True))
        )

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `review_loss`; labels are not used."""
        theirs = self._maps(teacher)
        fused: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, maps, target in zip(
            reversed(self.fusions), reversed(self._maps(network)), reversed(theirs), strict=True
        ):
            weight = fusion.enter[0].weight  # type: ignore[index, union-attr]
            result, deeper = fusion(maps.to(weight.dtype), deeper, target.shape[-2:])
            fused.append(result)
        return self.weight * review_loss(fused[::-1], theirs)

    def _maps(self, outputs: Outputs) -> list[Tensor]:
        maps = list(outputs.stages)
        if self.use_embedding:
            assert outputs.embedding is not None
            maps.append(outputs.embedding[:, :, None, None])
        return maps


def _convolution(channels: int, out: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))
