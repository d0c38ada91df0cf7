"""Blocks on images, ``[B, C, H, W] -> [B, C', H', W']``, in many ways in which people write them.

Some read numbers from attributes in `forward`, some from shapes; some call modules, some functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over channels as a subclass whose forward permutes."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over channels in own arithmetic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.g + self.b


class ResponseNorm(nn.Module):
    """Global response normalization (ConvNeXt V2), channels first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=(2, 3), keepdim=True)
        norm = norm / (norm.mean(1, keepdim=True) + 1e-6)
        return x + torch.addcmul(
            self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * norm
        )


NORMS = {
    "batch": lambda width: nn.BatchNorm2d(width, eps=1e-3, momentum=0.05),
    "group": lambda width: nn.GroupNorm(2 - width % 2, width),
    "one group": lambda width: nn.GroupNorm(1, width),
    "layer": LayerNorm2d,
    "channel": ChannelNorm,
    "instance": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
    "response": ResponseNorm,
    "none": lambda width: nn.Identity(),
}
ACTS = {
    "relu": lambda width: nn.ReLU(inplace=True),
    "gelu": lambda width: nn.GELU(),
    "silu": lambda width: nn.SiLU(),
    "prelu": lambda width: nn.PReLU(width),
    "one prelu": lambda width: nn.PReLU(),
    "hardswish": lambda width: nn.Hardswish(inplace=True),
    "tanh": lambda width: nn.Tanh(),
    "none": lambda width: nn.Identity(),
}


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, **kwargs)


class ConvNormAct(nn.Sequential):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        norm: str = "batch",
        act: str = "relu",
        padding_mode: str = "zeros",
    ) -> None:
        kwargs = {"groups": groups, "bias": norm == "none", "padding_mode": padding_mode}
        super().__init__(
            conv(inputs, outputs, kernel, stride, **kwargs),
            NORMS[norm](outputs),
            ACTS[act](outputs),
        )


class Residual(nn.Module):
    """Two convolutions around a shortcut, projected where the shape changes."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, norm: str = "batch", act: str = "relu"
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), NORMS[norm](outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), NORMS[norm](outputs)
        self.act = ACTS[act](outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), NORMS[norm](outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        x += shortcut
        return F.relu(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, linear: bool = False) -> None:
        super().__init__()
        self.linear = linear
        layer = nn.Linear if linear else conv
        self.fc1, self.fc2 = layer(width, 3), layer(3, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, _, _ = x.shape
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = gate.view(batch, width) if self.linear else gate
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(gate), inplace=True)))
        return x * gate.view(batch, width, 1, 1).expand_as(x)


class SpatialGate(nn.Module):
    """Mean and maximum over channels, a 7 x 7 convolution, a gate (CBAM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = conv(width, width)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.norm(self.conv(pooled)).sigmoid()


class Bottleneck(nn.Module):
    """Pointwise, grouped and pointwise convolution, with or without squeeze and excitation."""

    def __init__(
        self, width: int, inner: int, groups: int, excite: bool = False, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNormAct(width, inner, 1, norm=norm),
            ConvNormAct(inner, inner, 3, groups=groups, norm=norm, act="silu"),
            SqueezeExcite(inner) if excite else nn.Identity(),
            ConvNormAct(inner, width, 1, norm=norm, act="none"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Depthwise(nn.Module):
    """Inverted residual; with a multiplier, a depthwise layer has more outputs than inputs."""

    def __init__(self, width: int, expand: int = 2, multiplier: int = 1, act: str = "silu") -> None:
        super().__init__()
        inner = width * expand
        self.conv_pw = ConvNormAct(width, inner, 1, act=act)
        self.conv_dw = ConvNormAct(inner, inner * multiplier, 3, groups=inner, act=act)
        self.se = SqueezeExcite(inner * multiplier, linear=True)
        self.conv_pwl = ConvNormAct(inner * multiplier, width, 1, act="none")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_pwl(self.se(self.conv_dw(self.conv_pw(x))))


class ConvNeXt(nn.Module):
    """Depthwise 5 x 5, channels-last MLP, and a scale of the shape that ``scale`` says."""

    def __init__(self, width: int, norm: str = "layer", scale: str = "[C]") -> None:
        super().__init__()
        self.dw = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm](width)
        self.fc1, self.fc2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        shape = {"[C]": (width,), "[C,1,1]": (width, 1, 1), "[1,C,1,1]": (1, width, 1, 1)}[scale]
        self.gamma = nn.Parameter(torch.full(shape, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        if self.gamma.ndim == 1:
            return x + (self.gamma * y).permute(0, 3, 1, 2)
        return x + self.gamma * y.permute(0, 3, 1, 2)


class Gate(nn.Module):
    """Gates between old and new, as in a recurrent unit, or a gated linear unit."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.both = conv(width, 2 * width, 3)
        self.new = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "glu":
            return self.new(F.glu(self.both(x), dim=1))
        update, reset = self.both(x).chunk(2, 1)
        update, new = update.sigmoid(), torch.tanh(self.new(reset.sigmoid() * x))
        return (1 - update) * x + update * new


class Fusion(nn.Module):
    """A learned weight for each of several inputs (BiFPN); as many as anything else, perhaps."""

    def __init__(self, width: int, paths: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(conv(width, width, 2 * (k % 2) + 1) for k in range(paths))
        self.weights = nn.Parameter(torch.ones(paths))

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softplus(self.weights)
        return sum(path(x) * weights[k] / weights.sum() for k, path in enumerate(self.paths))


class Repeated(nn.Module):
    """One layer applied twice, and one behind two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 3)
        self.act1 = self.act2 = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.act1(self.conv(x))
        return x + self.act2(self.conv(x))
