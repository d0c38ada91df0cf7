"""ShuffleNet V1 and V2 for images of 32 x 32 pixels, registered with timm.

These are the networks of Zhang et al. (CVPR 2018, arXiv 1707.01083) with three groups, and of Ma et
al. (ECCV 2018, arXiv 1807.11164) at size 1. As in the literature on distillation, the stem is a
1 x 1 convolution. Parameters are named as in the checkpoints of this literature, so that such
checkpoints can be loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from gpd_cli.models.classifier import Classifier, cifar_configs

__all__ = ["CifarShuffleNetV1", "CifarShuffleNetV2"]

_STEM = 24
_BLOCKS = (4, 8, 4)
_WIDTHS_V1 = (240, 480, 960)
_GROUPS_V1 = 3
_WIDTHS_V2 = (116, 232, 464)
_LAST_V2 = 1024

_RULE = {"keep": ("halves",)}
"""The widening rule of units that call `shuffle_keeping_copies`.

The copies of a channel move together there, so its numbers are the student's in the wide network.
"""


class ShuffleUnit(nn.Module):
    """ShuffleNet V1's unit: ``[B, in, H, W]`` to ``[B, out, H/s, W/s]``.

    It is a bottleneck of grouped convolutions with a shuffle. At stride 1 the input is added to the
    result; at stride 2 the pooled input is concatenated with it.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output.
        stride: s, 1 or 2.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        made = out_chans - in_chans if stride == 2 else out_chans
        inner = made // 4
        # The stem has too few channels for groups.
        self.groups = 1 if in_chans == _STEM else _GROUPS_V1
        self.conv1 = _conv(in_chans, inner, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, 3, stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = _conv(inner, made, 1, groups=_GROUPS_V1)
        self.bn3 = nn.BatchNorm2d(made)
        self.relu = nn.ReLU()  # a module, so that a feature hook can keep its input

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output."""
        new = F.relu(self.bn1(self.conv1(x)))
        new = shuffle(new, self.groups)
        new = F.relu(self.bn2(self.conv2(new)))
        new = self.bn3(self.conv3(new))
        if self.stride == 1:
            new = new + x
        else:
            new = torch.cat([new, F.avg_pool2d(x, 3, self.stride, padding=1)], 1)
        result: Tensor = self.relu(new)
        return result


class SplitUnit(nn.Module):
    """ShuffleNet V2's unit at stride 1: ``[B, C, H, W]`` to ``[B, C, H, W]``.

    Half of the channels pass through unchanged.

    Args:
        chans: number of channels, C.
    """

    widening_rule = _RULE

    def __init__(self, chans: int) -> None:
        super().__init__()
        half = chans // 2
        self.halves = (2, half)
        self.conv1 = _conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output."""
        kept, new = x.chunk(2, 1)
        new = F.relu(self.bn1(self.conv1(new)))
        new = self.bn2(self.conv2(new))
        new = F.relu(self.bn3(self.conv3(new)))
        return shuffle_keeping_copies(torch.cat([kept, new], 1), self.halves)


class DownUnit(nn.Module):
    """ShuffleNet V2's unit at stride 2: ``[B, in, H, W]`` to ``[B, out, H/2, W/2]``.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output, half of them from each of two paths.
    """

    widening_rule = _RULE

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        half = out_chans // 2
        self.halves = (2, half)
        self.conv1 = _conv(in_chans, in_chans, 3, 2, groups=in_chans)
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.conv2 = _conv(in_chans, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(in_chans, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _conv(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output."""
        short = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        long = F.relu(self.bn3(self.conv3(x)))
        long = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(long)))))
        return shuffle_keeping_copies(torch.cat([short, long], 1), self.halves)


class _ShuffleNet(Classifier):
    """The common part of both networks: a 1 x 1 stem and three stages, each with stride 2.

    Args:
        widths: numbers of channels of the stages.
        first: function that makes the first unit of a stage, from its numbers of input and output
            channels.
        further: function that makes a further unit of a stage, from its number of channels.
        in_chans: number of image channels.
    """

    classifier_name = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int],
        first: Callable[[int, int], nn.Module],
        further: Callable[[int], nn.Module],
        in_chans: int,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_chans, _STEM, 1)
        self.bn1 = nn.BatchNorm2d(_STEM)
        chans, stages = _STEM, []
        for width, blocks in zip(widths, _BLOCKS, strict=True):
            rest = (further(width) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first(chans, width), *rest))
            chans = width
        self.layer1, self.layer2, self.layer3 = stages
        self.stages = [(f"layer{k + 1}", width, 2 ** (k + 1)) for k, width in enumerate(widths)]

    def forward_features(self, x: Tensor) -> Tensor:
        """The end of the last stage, ``[B, C, H/8, W/8]``, of images ``[B, C, H, W]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x


class CifarShuffleNetV1(_ShuffleNet):
    """ShuffleNet V1 with three groups: 240, 480 and 960 channels.

    Args:
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.
    """

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(
            _WIDTHS_V1,
            lambda in_chans, out_chans: ShuffleUnit(in_chans, out_chans, stride=2),
            lambda width: ShuffleUnit(width, width, stride=1),
            in_chans,
        )
        self.finish(_WIDTHS_V1[-1], num_classes, self.stages)


class CifarShuffleNetV2(_ShuffleNet):
    """ShuffleNet V2 at size 1: 116, 232 and 464 channels, then 1024.

    Args:
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.
    """

    def __init__(self, num_classes: int = 100, in_chans: int = 3) -> None:
        super().__init__(_WIDTHS_V2, DownUnit, SplitUnit, in_chans)
        self.conv2 = _conv(_WIDTHS_V2[-1], _LAST_V2, 1)
        self.bn2 = nn.BatchNorm2d(_LAST_V2)
        self.relu = nn.ReLU()  # a module, so that a feature hook can keep its input
        self.finish(_LAST_V2, num_classes, self.stages)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, 1024, H/8, W/8]``, of images ``[B, C, H, W]``."""
        last: Tensor = self.relu(self.bn2(self.conv2(super().forward_features(x))))
        return last


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of several groups.

    Args:
        x: a feature map, ``[B, C, H, W]``.
        groups: number of groups.

    Returns:
        The same channels in another order, ``[B, C, H, W]``.
    """
    x = x.unflatten(1, (groups, -1))
    return x.transpose(1, 2).flatten(1, 2)


def shuffle_keeping_copies(x: Tensor, groups: tuple[int, int]) -> Tensor:
    """Interleave the channels of several groups, so that the copies of a channel stay together.

    Args:
        x: a feature map, ``[B, C, H, W]``, in which the copies of a channel are side by side.
        groups: number of groups, and number of different channels in each of them (as many as in
            the student).

    Returns:
        The same channels in another order, ``[B, C, H, W]``.
    """
    x = x.unflatten(1, (*groups, -1))
    return x.transpose(1, 2).flatten(1, 3)


def _conv(
    in_chans: int, out_chans: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False)


default_cfgs = cifar_configs(
    ["cifar_shufflenetv1", "cifar_shufflenetv2"], first_conv="conv1", classifier="linear"
)


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV1:
    """ShuffleNet V1 with three groups, 0.95 million parameters."""
    return build_model_with_cfg(CifarShuffleNetV1, "cifar_shufflenetv1", pretrained, **kwargs)


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    """ShuffleNet V2 at size 1, 1.36 million parameters."""
    return build_model_with_cfg(CifarShuffleNetV2, "cifar_shufflenetv2", pretrained, **kwargs)
