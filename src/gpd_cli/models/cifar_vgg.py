"""VGG networks for images of 32 x 32 pixels, with batch norm, registered with timm.

These are the networks of Simonyan and Zisserman (ICLR 2015, arXiv 1409.1556), in the form of the
literature on distillation: with one linear layer on pooled features, and without pooling before the
last stage. Parameters are named as in the checkpoints of this literature, so that such checkpoints
can be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from gpd_cli.models.classifier import Classifier, cifar_configs, start_from_fan_out

__all__ = ["CifarVGG"]

_WIDTHS = (64, 128, 256, 512, 512)
_LARGE = 64  # from this side of the images on, maps are halved four times instead of three


class CifarVGG(Classifier):
    """Five stages of 3 x 3 convolutions, with pooling in between, and a classifier.

    Args:
        depths: number of convolutions in each of the five stages.
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.
        img_size: side of the images; from 64 pixels on, there is pooling before the last stage.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 100,
        in_chans: int = 3,
        img_size: int = 32,
    ) -> None:
        super().__init__()
        self.halved = 4 if img_size >= _LARGE else 3
        stages = []
        for stage, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True)):
            self.add_module(f"block{stage}", _stage(depth, in_chans, width))
            self.add_module(f"act{stage}", nn.ReLU(inplace=True))
            stages.append((f"act{stage}", width, 2 ** min(stage, self.halved)))
            in_chans = width
        self.finish(in_chans, num_classes, stages)
        start_from_fan_out(self, linear_std=0.01)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, 512, H/8, W/8]``, of images ``[B, C, H, W]``."""
        for stage in range(len(_WIDTHS)):
            if 0 < stage <= self.halved:
                x = F.max_pool2d(x, 2)
            x = self.get_submodule(f"act{stage}")(self.get_submodule(f"block{stage}")(x))
        return x


def _stage(depth: int, in_chans: int, width: int) -> nn.Sequential:
    """Convolutions with batch norm, and ReLU in between; the last ReLU is outside the stage."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(in_chans, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        in_chans = width
    return nn.Sequential(*layers[:-1])


default_cfgs = cifar_configs(
    [f"cifar_vgg{depth}" for depth in (8, 11, 13, 16, 19)],
    first_conv="block0.0",
    classifier="classifier",
)


def _build(variant: str, pretrained: bool, depths: Sequence[int], **kwargs: Any) -> CifarVGG:
    return build_model_with_cfg(CifarVGG, variant, pretrained, depths=depths, **kwargs)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-8: one convolution a stage, 3.97 million parameters."""
    return _build("cifar_vgg8", pretrained, (1, 1, 1, 1, 1), **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11, 9.28 million parameters."""
    return _build("cifar_vgg11", pretrained, (1, 1, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-13: two convolutions a stage, 9.46 million parameters."""
    return _build("cifar_vgg13", pretrained, (2, 2, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16, 14.77 million parameters."""
    return _build("cifar_vgg16", pretrained, (2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-19, 20.09 million parameters."""
    return _build("cifar_vgg19", pretrained, (2, 2, 4, 4, 4), **kwargs)
