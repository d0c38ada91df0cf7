"""MobileNet V1 as in the runs of GPD's authors, registered with timm."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import EfficientNet, mobilenetv1_100
from torch import nn

from gpd_cli.errors import ModelError

__all__ = ["mobilenetv1_relu"]


@register_model
def mobilenetv1_relu(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNet V1 (Howard et al., 2017) with ReLU and PyTorch's initialization.

    The network has the layers and parameter names of timm's ``mobilenetv1_100``, so it loads the
    weight files of either. timm's network differs in two ways: it has ReLU6, and its initial
    weights have a larger deviation (1.7 times in pointwise kernels, 2.4 times in depthwise
    kernels).
    """
    if pretrained:
        raise ModelError(
            "No pretrained weights exist for mobilenetv1_relu; those of timm's mobilenetv1_100 are "
            "of a network with ReLU6, so choose that network for them"
        )
    network: EfficientNet = mobilenetv1_100(**{"act_layer": "relu", **kwargs})
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return network
