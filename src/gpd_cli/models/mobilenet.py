"""MobileNet V1 as the authors of GPD train it, registered with timm."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import EfficientNet, mobilenetv1_100
from torch import nn

__all__ = ["mobilenetv1_relu"]


@register_model
def mobilenetv1_relu(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNet V1 (Howard et al., 2017) with ReLU and PyTorch's initialization.

    It is timm's ``mobilenetv1_100``, parameter names included, so that either's files of weights
    load; that one has ReLU6, and draws its weights with another deviation (1.7 times as large in
    pointwise kernels, 2.4 times in depthwise ones).
    """
    network = mobilenetv1_100(pretrained, **{"act_layer": "relu", **kwargs})
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not pretrained:
            module.reset_parameters()
    return network
