"""Blocks on images that change or use the place of a pixel: resolution, position, windows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks.image import conv


class Resample(nn.Module):
    """Changes of resolution other than strides."""

    def __init__(self, inputs: int, outputs: int, how: str) -> None:
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm2d(outputs)
        if how == "unshuffle" or how == "space to depth":
            self.conv = conv(4 * inputs, outputs)
        elif how == "shuffle":
            self.conv = conv(inputs, 4 * outputs)
        elif how == "transposed":
            self.conv = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        elif how == "transposed depthwise":
            self.up = nn.ConvTranspose2d(inputs, inputs, 3, 2, 1, 1, groups=inputs)
            self.conv = conv(inputs, outputs)
        else:
            self.conv = conv(inputs, outputs)
            self.register_buffer("blur", torch.tensor([1.0, 2.0, 1.0]).outer(torch.ones(3)) / 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "unshuffle":
            x = self.conv(F.pixel_unshuffle(x, 2))
        elif self.how == "space to depth":
            b, c, h, w = x.shape
            x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
            x = self.conv(x.reshape(b, c * 4, h // 2, w // 2))
        elif self.how == "shuffle":
            x = F.pixel_shuffle(self.conv(x), 2)
        elif self.how == "transposed":
            x = self.conv(x)
        elif self.how == "transposed depthwise":
            x = self.conv(self.up(x))
        elif self.how == "interpolate":
            x = self.conv(F.interpolate(x, scale_factor=2, mode="bilinear"))
        elif self.how == "average":
            x = self.conv(F.avg_pool2d(x, 2, ceil_mode=True))
        elif self.how == "maximum":
            x = self.conv(F.max_pool2d(x, 3, 2, 1))
        else:
            blur = self.blur.expand(x.shape[1], 1, 3, 3)
            x = self.conv(F.conv2d(x, blur, stride=2, padding=1, groups=x.shape[1]))
        return self.norm(x)


class Window(nn.Module):
    """Channels-last windows, rolled, with a linear layer within and one across (Swin, gMLP)."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window_size, self.dim = window, width
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)
        self.across = nn.Linear(window * window, window * window)

    def forward(self, x: Tensor) -> Tensor:
        s = self.window_size
        x = x.permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), shifts=(-1, -1), dims=(1, 2))
        y = y.view(b, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        y = self.across(self.fc(y).transpose(1, 2)).transpose(1, 2)
        y = y.view(b, h // s, w // s, s, s, self.dim).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return (x + torch.roll(y, shifts=(1, 1), dims=(1, 2))).permute(0, 3, 1, 2)


class Coordinates(nn.Module):
    """A position embedding on the map, as a parameter or as a buffer."""

    def __init__(self, width: int, size: int, buffer: bool) -> None:
        super().__init__()
        self.conv = conv(width, width)
        table = torch.randn(1, width, size, size, generator=torch.Generator().manual_seed(1))
        if buffer:
            self.register_buffer("pos_embed", table)
        else:
            self.pos_embed = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x + self.pos_embed))


class Unfolded(nn.Module):
    """Patches side by side, then a linear layer (T2T)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(9 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return self.fc(F.unfold(x, 3, padding=1).mT).mT.reshape(b, -1, h, w)
