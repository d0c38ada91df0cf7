"""MobileNet V2 for images of 32 x 32 pixels, registered with timm.

This is the network of Sandler et al. (CVPR 2018, arXiv 1801.04381) in the form of the literature on
distillation: at half the width, with ReLU in place of ReLU6, and without three of the strides.
Parameters are named as in the checkpoints of this literature, so that such checkpoints can be
loaded.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from gpd_cli.models.classifier import Classifier, cifar_configs, start_from_fan_out

__all__ = ["CifarMobileNetV2", "InvertedResidual"]

_STAGES = (  # expanded?, width, blocks, stride
    (False, 16, 1, 1),
    (True, 24, 2, 1),
    (True, 32, 3, 2),
    (True, 64, 4, 2),
    (True, 96, 3, 1),
    (True, 160, 3, 2),
    (True, 320, 1, 1),
)
_FEATURES = (1, 2, 4, 6)  # stages whose ends the literature distils from
_LAST = 1280


class InvertedResidual(nn.Module):
    """1 x 1, depthwise 3 x 3 and 1 x 1: ``[B, in, H, W]`` to ``[B, out, H/s, W/s]``.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output.
        stride: s, the stride of the depthwise convolution.
        expansion: number of inner channels divided by the number of input channels.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_chans * expansion
        self.residual = stride == 1 and in_chans == out_chans
        self.conv = nn.Sequential(
            *_unit(in_chans, inner, 1),
            *_unit(inner, inner, 3, stride, groups=inner),
            *_unit(inner, out_chans, 1)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class CifarMobileNetV2(Classifier):
    """A stem at stride 2, seven stages of inverted residuals, 1280 channels and a classifier.

    Args:
        width: factor of the paper's numbers of channels; below 1 it does not apply to the last
            1280 channels.
        expansion: number of inner channels of a block divided by the number of its input channels.
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.
    """

    classifier_name = "classifier.0"

    def __init__(
        self,
        width: float = 0.5,
        expansion: int = 6,
        num_classes: int = 100,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        chans, reduction = int(32 * width), 2
        self.conv1 = nn.Sequential(*_unit(in_chans, chans, 3, 2))
        self.blocks = nn.Sequential()
        ends = []
        for expanded, full, blocks, stride in _STAGES:
            stage = nn.Sequential()
            for block in range(blocks):
                first = stride if block == 0 else 1
                out_chans, factor = int(full * width), expansion if expanded else 1
                stage.append(InvertedResidual(chans, out_chans, first, factor))
                chans = out_chans
            reduction *= stride
            ends.append((f"blocks.{len(self.blocks)}", chans, reduction))
            self.blocks.append(stage)
        last = max(_LAST, int(_LAST * width))
        self.conv2 = nn.Sequential(*_unit(chans, last, 1))
        self.classifier = nn.Sequential(nn.Identity())
        self.finish(last, num_classes, [ends[k] for k in _FEATURES])
        start_from_fan_out(self, linear_std=0.01)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, 1280, H/16, W/16]``, of images ``[B, C, H, W]``."""
        x = self.conv2(self.blocks(self.conv1(x)))
        return x


def _unit(
    in_chans: int, out_chans: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution with batch norm and ReLU."""
    return [
        nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_chans),
        nn.ReLU(inplace=True),
    ]


default_cfgs = cifar_configs(
    ["cifar_mobilenetv2_half"], first_conv="conv1.0", classifier="classifier.0"
)


@register_model
def cifar_mobilenetv2_half(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """MobileNet V2 at half the width, 0.81 million parameters."""
    return build_model_with_cfg(CifarMobileNetV2, "cifar_mobilenetv2_half", pretrained, **kwargs)
