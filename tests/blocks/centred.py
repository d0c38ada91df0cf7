"""A layer with buffers that its forward changes first and uses then."""

import torch
from torch import Tensor, nn


class Centred(nn.Module):
    """A convolution, whose running means and deviations are taken away once they have changed."""

    def __init__(self, inputs: int, outputs: int, rate: float = 0.5, **options: int) -> None:
        super().__init__()
        self.rate = rate
        self.convolution = nn.Conv2d(inputs, outputs, 3, **options)
        self.register_buffer("centre", torch.zeros(outputs))
        self.register_buffer("scale", torch.ones(outputs))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.convolution(images)
        if self.training:
            with torch.no_grad():
                self.centre.lerp_(maps.mean((0, 2, 3)), self.rate)  # changed in place
                new = self.rate * maps.std((0, 2, 3))
                self.scale = (1 - self.rate) * self.scale + new  # replaced
        return ((maps - self.centre[:, None, None]) / self.scale[:, None, None]).relu()
