"""ResNets for images of 32 x 32 pixels, registered with timm.

These are the CIFAR networks of He et al. (CVPR 2016, arXiv 1512.03385, section 4.2), in the form in
which the literature on distillation compares students and teachers. They have projection shortcuts
(1 x 1 convolution and batch norm) where the shape changes. The variants ``8x4`` and ``32x4`` are
two times as wide in the stem and four times as wide in the stages, and ``cifar_resnet50`` consists
of bottlenecks. Parameters are named as in the checkpoints of this literature (``conv1``,
``layer1.0.conv1``, ``fc``), so that such checkpoints can be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from gpd_cli.models.classifier import Classifier, cifar_configs, start_from_fan_out

__all__ = ["BasicBlock", "Bottleneck", "CifarBottleneckResNet", "CifarResNet"]

_WIDTHS = (16, 16, 32, 64)
_WIDTHS_X4 = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: ``[B, in, H, W]`` to ``[B, out, H/s, W/s]``.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output.
        stride: s, the stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_chans != out_chans:
            self.downsample = _projection(in_chans, out_chans, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.act2(x + shortcut)
        return x


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution and a shortcut: ``[B, in, H, W]`` to ``[B, out, ...]``.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output, four times the inner channels.
        stride: stride of the 3 x 3 convolution and of the shortcut.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        inner = out_chans // 4
        self.conv1 = nn.Conv2d(in_chans, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, out_chans, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        self.act3 = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_chans != out_chans:
            self.shortcut.extend(_projection(in_chans, out_chans, stride))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)) + shortcut)
        return x


class CifarResNet(Classifier):
    """A stem, three stages of basic blocks at strides 1, 2 and 2, global pooling and a classifier.

    Args:
        depth: number of convolutions, plus one for the classifier: 6n + 2 for n blocks a stage.
        widths: numbers of channels of the stem and of the three stages.
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.

    Raises:
        ValueError: when the depth is not 6n + 2.
    """

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] = _WIDTHS,
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 8, 14, 20 or another 6n + 2, not {depth}")
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, blocks, widths[0], widths[1], stride=1)
        self.layer2 = _stage(BasicBlock, blocks, widths[1], widths[2], stride=2)
        self.layer3 = _stage(BasicBlock, blocks, widths[2], widths[3], stride=2)
        stages = [(f"layer{k}", widths[k], 2 ** (k - 1)) for k in (1, 2, 3)]
        self.finish(widths[3], num_classes, stages)
        start_from_fan_out(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, widths[3], H/4, W/4]``, of images ``[B, C, H, W]``."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x


class CifarBottleneckResNet(Classifier):
    """The ResNet of bottlenecks for ImageNet, with a 3 x 3 stem at stride 1: a large teacher.

    Args:
        blocks: number of blocks in each of the four stages.
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.
    """

    classifier_name = "linear"

    def __init__(
        self, blocks: Sequence[int] = (3, 4, 6, 3), num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(Bottleneck, blocks[0], 64, 256, stride=1)
        self.layer2 = _stage(Bottleneck, blocks[1], 256, 512, stride=2)
        self.layer3 = _stage(Bottleneck, blocks[2], 512, 1024, stride=2)
        self.layer4 = _stage(Bottleneck, blocks[3], 1024, 2048, stride=2)
        stages = [(f"layer{k}", 128 * 2**k, 2 ** (k - 1)) for k in (1, 2, 3, 4)]
        self.finish(2048, num_classes, stages)
        start_from_fan_out(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, 2048, H/8, W/8]``, of images ``[B, C, H, W]``."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x


def _projection(in_chans: int, out_chans: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, 1, stride, bias=False), nn.BatchNorm2d(out_chans)
    )


def _stage(
    block: type[BasicBlock | Bottleneck], count: int, in_chans: int, out_chans: int, stride: int
) -> nn.Sequential:
    return nn.Sequential(
        block(in_chans, out_chans, stride),
        *(block(out_chans, out_chans) for _ in range(count - 1)),
    )


default_cfgs = {
    **cifar_configs(
        [
            f"cifar_resnet{variant}"
            for variant in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")
        ],
        first_conv="conv1",
        classifier="fc",
    ),
    **cifar_configs(["cifar_resnet50"], first_conv="conv1", classifier="linear"),
}


def _build(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8: one block a stage, 0.08 million parameters."""
    return _build("cifar_resnet8", pretrained, depth=8, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-14: two blocks a stage, 0.18 million parameters."""
    return _build("cifar_resnet14", pretrained, depth=14, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: three blocks a stage, 0.28 million parameters."""
    return _build("cifar_resnet20", pretrained, depth=20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32: five blocks a stage, 0.47 million parameters."""
    return _build("cifar_resnet32", pretrained, depth=32, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44: seven blocks a stage, 0.67 million parameters."""
    return _build("cifar_resnet44", pretrained, depth=44, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56: nine blocks a stage, 0.86 million parameters."""
    return _build("cifar_resnet56", pretrained, depth=56, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110: eighteen blocks a stage, 1.74 million parameters."""
    return _build("cifar_resnet110", pretrained, depth=110, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8x4: one block a stage, four times as wide, 1.23 million parameters."""
    return _build("cifar_resnet8x4", pretrained, depth=8, widths=_WIDTHS_X4, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32x4: five blocks a stage, four times as wide, 7.43 million parameters."""
    return _build("cifar_resnet32x4", pretrained, depth=32, widths=_WIDTHS_X4, **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarBottleneckResNet:
    """ResNet-50 of bottlenecks in four stages, 23.71 million parameters."""
    return build_model_with_cfg(CifarBottleneckResNet, "cifar_resnet50", pretrained, **kwargs)
