"""A student that ends in its static teacher's classifier (SimKD, Chen et al., CVPR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpd_cli.errors import ModelError
from gpd_cli.models.end_layers import classifier_names


class ReusedClassifier(nn.Module):
    """A network whose classifier is replaced by a projector and a classifier of another width.

    The projector is SimKD's bottleneck of three layers, with half the teacher's width inside. Here
    it runs on pooled features, so that any network that ends in a linear layer can have it, even a
    transformer.

    Args:
        body: a network with a classifier, which is changed: its classifier is removed.
        features: width of the static teacher's embedding.
        num_classes: number of classes.
        relu: whether the projector ends in a ReLU, as in SimKD; false for teachers whose embedding
            has negative entries (most transformers).

    Raises:
        ModelError: when the body does not end in one linear layer, or the width is less than 1.
    """

    def __init__(self, body: nn.Module, features: int, num_classes: int, relu: bool = True) -> None:
        super().__init__()
        if not isinstance(features, int) or features < 1:
            raise ModelError(f"The argument 'features' must be 1 or more, not {features}.")
        name, last = _classifier(body)
        owner, _, leaf = name.rpartition(".")
        setattr(body.get_submodule(owner), leaf, nn.Identity())
        self.replaced = name
        self.num_classes = num_classes
        self.pretrained_cfg = getattr(body, "pretrained_cfg", None)
        self.body = body
        inner = max(1, features // 2)
        self.projector = nn.Sequential(
            nn.Linear(last.in_features, inner, bias=False),
            nn.BatchNorm1d(inner),
            nn.ReLU(),
            nn.Linear(inner, inner, bias=False),
            nn.BatchNorm1d(inner),
            nn.ReLU(),
            nn.Linear(inner, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU() if relu else nn.Identity(),
        )
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, ``[B, num_classes]``, of images ``[B, C, H, W]``."""
        logits: Tensor = self.classifier(self.projector(self.body(images)))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: those that the body names, as in timm."""
        names = getattr(self.body, "no_weight_decay", None)
        return {f"body.{name}" for name in names()} if callable(names) else set()

    def adopt(self, classifier: nn.Linear) -> None:
        """Copy the weights of the static teacher's classifier into this network's classifier.

        Args:
            classifier: the static teacher's classifier.

        Raises:
            ModelError: when the classifier has another width.
        """
        ours = self.classifier
        if classifier.weight.shape != ours.weight.shape:
            raise ModelError(
                f"The static teacher's classifier takes {classifier.in_features} features but the "
                f"student was built for {ours.in_features}; set --model.student_args "
                f"'{{features: {classifier.in_features}}}'."
            )
        with torch.no_grad():
            ours.weight.copy_(classifier.weight)
            nn.init.zeros_(ours.bias)
            if classifier.bias is not None:
                ours.bias.copy_(classifier.bias)


def _classifier(network: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the one linear layer that gives a network's logits."""
    names = classifier_names(network)
    layer = network.get_submodule(names[0]) if names else None
    if len(names) != 1 or not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{type(network).__name__} has no single linear classifier that the static teacher's "
            "classifier could replace; choose another student for simkd/."
        )
    return names[0], layer
