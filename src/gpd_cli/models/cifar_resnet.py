"""ResNets for images of 32 x 32 pixels, registered with timm.

The CIFAR networks of He et al. (CVPR 2016, arXiv 1512.03385, section 4.2), in the form in which the
literature on distillation compares students and teachers: projection shortcuts (1 x 1 convolution
and batch norm) where the shape changes, and the variants ``8x4`` and ``32x4`` that are two times as
wide in the stem and four times as wide in the stages. Modules are named as in torchvision's ResNet
(``conv1``, ``layer1.0.conv1``, ``fc``), which is also what that literature's checkpoints use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["BasicBlock", "CifarResNet"]

_WIDTHS = (16, 16, 32, 64)
_WIDTHS_X4 = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: ``[B, in, H, W]`` to ``[B, out, H/s, W/s]``.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output.
        stride: s, of the first convolution and of the shortcut.
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
            self.downsample = nn.Sequential(
                nn.Conv2d(in_chans, out_chans, 1, stride, bias=False), nn.BatchNorm2d(out_chans)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.act2(x + shortcut)


class CifarResNet(nn.Module):
    """A stem, three stages of basic blocks at strides 1, 2 and 2, global pooling and a classifier.

    Args:
        depth: counts convolutions and the classifier: 6n + 2 for n blocks a stage.
        widths: channels of the stem and of the three stages.
        num_classes: outputs; 0 for pooled features instead of logits.
        in_chans: image channels.

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
            raise ValueError(f"depth is {depth}, but must be 8, 14, 20 or another 6n + 2")
        self.num_features = widths[3]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks, widths[0], widths[1], stride=1)
        self.layer2 = _stage(blocks, widths[1], widths[2], stride=2)
        self.layer3 = _stage(blocks, widths[2], widths[3], stride=2)
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The classifier, as timm's models name it."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Put in a new classifier, as timm's models do; 0 classes leave pooled features."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, widths[3], H/4, W/4]``, of images ``[B, C, H, W]``."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[B, num_classes]`` of a feature map; pooled features with `pre_logits`."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, H, W]``."""
        return self.forward_head(self.forward_features(x))


def _stage(blocks: int, in_chans: int, out_chans: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_chans, out_chans, stride),
        *(BasicBlock(out_chans, out_chans) for _ in range(blocks - 1)),
    )


_CIFAR100 = {
    "url": "",
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5071, 0.4865, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "first_conv": "conv1",
    "classifier": "fc",
}

default_cfgs = generate_default_cfgs(
    {
        f"cifar_resnet{variant}": dict(_CIFAR100)
        for variant in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")
    }
)


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
