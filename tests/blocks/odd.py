"""Blocks on images that may be refused: seldom met, or dependent on the width by nature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks.image import conv


class MatrixProduct(nn.Module):
    """Own parameters instead of a layer."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.matrix = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "conv":
            return F.conv2d(x, self.matrix[:, :, None, None])
        if self.how == "linear":
            return F.linear(x.permute(0, 2, 3, 1), self.matrix).permute(0, 3, 1, 2)
        return torch.einsum("bchw,cd->bdhw", x, self.matrix)


POSITIONAL = {
    "flip": lambda x, width: x.flip(1),
    "roll": lambda x, width: x.roll(1, dims=1),
    "sum": lambda x, width: x + x.sum(1, keepdim=True),
    "softmax": lambda x, width: x.softmax(1),
    "scaled softmax": lambda x, width: x.softmax(1) * x.shape[1],
    "normalize": lambda x, width: F.normalize(x, dim=1),
    "cumulative": lambda x, width: x.cumsum(1),
    "sort": lambda x, width: x.sort(dim=1).values,
    "first": lambda x, width: x * x[:, :1],
    "last": lambda x, width: x + x[:, -1:],
    "ramp": lambda x, width: x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None, None],
    "shape": lambda x, width: x / x.shape[1],
    "width": lambda x, width: x / width,
    "maxout": lambda x, width: x.unflatten(1, (-1, 2)).amax(2).repeat_interleave(2, 1),
    "largest": lambda x, width: x * (x >= x.topk(2, dim=1).values[:, -1:]),
    "response": lambda x, width: F.local_response_norm(x, 3),
    "standardize": lambda x, width: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
}


class Positional(nn.Module):
    """Functions in which the channels' order or number counts."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how, self.width = how, width
        self.before, self.after = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(POSITIONAL[self.how](self.before(x), self.width))


class TrainingOnly(nn.Module):
    """A path that runs in train mode alone, or is another one then."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv1, self.conv2 = conv(width, width, 3), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.how == "more":
            return y + self.conv2(x) if self.training else y
        if self.how == "other":
            return y + (self.conv2(x) if self.training else self.conv2(x.flip(3)))
        return y + (self.conv2(x.roll(1, 1)) if self.training else self.conv2(x))


class DynamicConv(nn.Module):
    """Experts' kernels mixed by a gate (CondConv)."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate = nn.Linear(width, experts)
        self.weight = nn.Parameter(torch.zeros(experts, width, width, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        gate = self.gate(x.mean((2, 3))).softmax(1)
        kernel = torch.einsum("be,eoikl->boikl", gate, self.weight).flatten(0, 1)
        return F.conv2d(x.reshape(1, b * c, h, w), kernel, padding=1, groups=b).view(b, -1, h, w)


class Involution(nn.Module):
    """Kernels computed from the input, one for each group of channels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.kernel = conv(width, 9 * groups)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernel = self.kernel(x).view(b, self.groups, 1, 9, h, w)
        patches = F.unfold(x, 3, padding=1).view(b, self.groups, c // self.groups, 9, h, w)
        return (kernel * patches).sum(3).view(b, c, h, w)


class Frequencies(nn.Module):
    """A learned filter in the frequency domain (GFNet)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(size, size // 2 + 1, width, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        x = x * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(x, dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)


class Sequence(nn.Module):
    """Recurrent layers of `torch.nn` along the rows."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[how]
        self.rnn = layer(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y, _ = self.rnn(x.permute(0, 2, 3, 1).reshape(b * h, w, c))
        return y.reshape(b, h, w, -1).permute(0, 3, 1, 2)


class Reparametrized(nn.Module):
    """Weights that are computed: normalized, standardized, or tied to another layer's."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(width, width, 3), conv(width, width, 3)
        if how == "weight norm":
            nn.utils.parametrizations.weight_norm(self.conv1)
        elif how == "tied":
            self.conv2.weight = self.conv1.weight
        else:
            self.conv2 = StandardizedConv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class StandardizedConv(nn.Conv2d):
    """Weight standardization in a subclass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Configured(nn.Module):
    """Widths in places where nobody looks for them: a dictionary, a string, a closure."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.config = {"width": width}
        self.code = str(width)
        self.reshape = lambda x: x.view(-1, 1, width, *x.shape[2:])
        self.how, self.conv = how, conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "closure":
            return self.reshape(x).flatten(1, 2)
        width = self.config["width"] if self.how == "dictionary" else int(self.code)
        return x.view(-1, width, *x.shape[2:])
