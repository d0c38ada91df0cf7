"""A small student, with which a case takes only a moment."""

from __future__ import annotations

from torch import Tensor, nn


class Student(nn.Module):
    """A network of two convolutions and a linear layer.

    Args:
        num_classes: number of classes.
        in_chans: number of channels of the images.
        width: number of output channels of the first convolution.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """The logits, ``[B, num_classes]``, of images ``[B, C, H, W]``."""
        return self.head(self.conv2(self.bn1(self.conv1(images)).relu()).relu().mean((2, 3)))
