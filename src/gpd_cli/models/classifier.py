"""The base class of the networks in this folder, with the interface of timm's classifiers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

_CIFAR100 = {
    "url": "",
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5071, 0.4865, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
}


class Classifier(nn.Module):
    """A classifier of a body, which computes a feature map, average pooling and a linear layer.

    The constructor of a subclass builds the body and then calls `finish`; the subclass defines
    `forward_features`.
    """

    classifier_name: ClassVar[str] = "fc"
    """Qualified name of the linear layer."""

    def finish(
        self, num_features: int, num_classes: int, stages: Iterable[tuple[str, int, int]]
    ) -> None:
        """Make the classifier, and set ``feature_info`` to the ends of the stages.

        Args:
            num_features: number of channels of the last feature map.
            num_classes: number of outputs; 0 for pooled features instead of logits.
            stages: for each stage the name of the module whose output is the end of the stage, the
                number of channels of this output, and the factor by which its sides are shorter
                than those of the image.
        """
        self.num_features = num_features
        self.feature_info = [
            {"module": module, "num_chs": channels, "reduction": reduction}
            for module, channels, reduction in stages
        ]
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The classifier, under the method name of timm's models."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new classifier, as in timm's models.

        Args:
            num_classes: number of outputs; 0 for pooled features instead of logits.
        """
        self.num_classes = num_classes
        owner, _, leaf = self.classifier_name.rpartition(".")
        new = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self.get_submodule(owner), leaf, new)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, num_features, h, w]``, of images ``[B, C, H, W]``."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[B, num_classes]`` of a feature map; pooled features with `pre_logits`."""
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, H, W]``."""
        return self.forward_head(self.forward_features(x))


def cifar_configs(names: Sequence[str], *, first_conv: str, classifier: str) -> dict[str, Any]:
    """Make timm's configurations of networks for the images of CIFAR-100.

    Args:
        names: names of the networks.
        first_conv: name of the networks' first convolution.
        classifier: name of the networks' linear layer.
    """
    config = {**_CIFAR100, "first_conv": first_conv, "classifier": classifier}
    configs: dict[str, Any] = generate_default_cfgs({name: dict(config) for name in names})
    return configs


def start_from_fan_out(network: nn.Module, linear_std: float | None = None) -> None:
    """Initialize the convolutions by their fan-out, as in He et al. (ICCV 2015).

    Args:
        network: the network, which is changed in place.
        linear_std: standard deviation of the weights of linear layers, whose biases then start at
            0; by default linear layers are not changed.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
