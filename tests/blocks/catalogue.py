"""What random networks are made of.

This is the one place that says which building blocks have to expand at whole ratios; the odd ones
may be refused, in one sentence. Neither may ever expand inexactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from blocks import attention, channels, image, odd, space, tokens

WIDTHS = st.sampled_from((4, 8, 12, 6))
"""Channels; all even, and most shared with a number of heads, tokens or classes."""


@dataclass(frozen=True)
class Spec:
    """A module's type and arguments; its representation can be run as Python."""

    cls: Callable[..., nn.Module]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.kwargs.items())
        return f"{self.cls.__module__}.{self.cls.__name__}({arguments})"

    def build(self) -> nn.Module:
        return self.cls(**self.kwargs)


Blocks = dict[str, Callable[[int, int], SearchStrategy[Spec]]]


def spec(cls: Callable[..., nn.Module], /, **kwargs: Any) -> SearchStrategy[Spec]:
    """A module with drawn arguments; values that are not strategies are taken as they are."""
    drawn = {
        name: value if isinstance(value, SearchStrategy) else st.just(value)
        for name, value in kwargs.items()
    }
    return st.builds(Spec, st.just(cls), st.fixed_dictionaries(drawn))


def one(*values: Any) -> SearchStrategy[Any]:
    return st.sampled_from(values)


def divisors(width: int, most: int = 4) -> SearchStrategy[int]:
    return st.sampled_from([k for k in range(most, 0, -1) if width % k == 0])


USUAL_NORMS = one("batch", "group", "one group", "layer", "none", "channel", "instance")
USUAL_ACTS = one("relu", "gelu", "prelu", "silu", "one prelu", "hardswish", "tanh", "none")
BOTH = st.booleans()

# Given the channels and the height of the image, or the width and the number of tokens.
IMAGE_BLOCKS: Blocks = {
    "convolution": lambda c, s: spec(
        image.ConvNormAct,
        inputs=c,
        outputs=WIDTHS,
        kernel=one(3, 1, 5) if s > 2 else one(3, 1),  # reflected padding is less than the image
        stride=one(1, 2) if s > 2 else 1,  # instance norms take more than a pixel
        norm=USUAL_NORMS,
        act=USUAL_ACTS,
        padding_mode=one("zeros", "reflect", "circular"),
    ),
    "grouped": lambda c, s: spec(
        image.Bottleneck,
        width=c,
        inner=one(8, 12),
        groups=one(2, 4, 1),
        excite=BOTH,
        norm=USUAL_NORMS,
    ),
    "depthwise": lambda c, s: spec(
        image.Depthwise, width=c, expand=one(2, 1), multiplier=one(1, 2), act=USUAL_ACTS
    ),
    "concatenation": lambda c, s: spec(
        channels.Concatenation,
        width=c,
        growth=st.lists(one(4, 2, 3), min_size=1, max_size=3).map(tuple),
        keep=one("first", "last", ""),
    ),
    "split": lambda c, s: spec(
        channels.CrossStage,
        width=c,
        half=one(4, 3),
        how=one("chunk", "split by size", "split by sizes", "slices"),
    ),
    "partial": lambda c, s: spec(
        channels.PartialConv, width=c, part=st.sampled_from([k for k in (2, 3) if k < c - 1] or [1])
    ),
    "hierarchical": lambda c, s: spec(channels.Hierarchical, width=c, scales=divisors(c, c // 2)),
    "shuffle": lambda c, s: spec(
        channels.Shuffle, width=c, groups=divisors(c), how=one("view", "unflatten", "module")
    ),
    "residual": lambda c, s: spec(
        image.Residual,
        inputs=c,
        outputs=WIDTHS,
        stride=one(1, 2) if s > 2 else 1,
        norm=USUAL_NORMS,
        act=USUAL_ACTS,
    ),
    "squeeze-excite": lambda c, s: spec(image.SqueezeExcite, width=c, linear=BOTH),
    "spatial gate": lambda c, s: spec(image.SpatialGate, width=c),
    "convnext": lambda c, s: spec(
        image.ConvNeXt,
        width=c,
        norm=one("layer", "rms"),
        scale=one("[C]", "[C,1,1]", "[1,C,1,1]"),
    ),
    "gate": lambda c, s: spec(image.Gate, width=c, how=one("glu", "gru")),
    "resampling": lambda c, s: spec(
        space.Resample,
        inputs=c,
        outputs=WIDTHS,
        how=one("unshuffle", "interpolate", "average", "maximum", "blur", "space to depth")
        if s % 2 == 0
        else one("interpolate", "average", "maximum", "blur"),
    ),
    "non-local": lambda c, s: spec(
        channels.NonLocal, width=c, heads=divisors(c), how=one("view", "dim", "heads", "channels")
    ),
    "coordinates": lambda c, s: spec(space.Coordinates, width=c, size=s, buffer=BOTH),
    "fusion": lambda c, s: spec(image.Fusion, width=c, paths=one(2, 4, 3)),
    "repeated": lambda c, s: spec(image.Repeated, width=c),
    "window": lambda c, s: spec(space.Window, width=c, window=divisors(s)),
    "channel attention": lambda c, s: spec(channels.EfficientChannelAttention, width=c),
    "selective kernel": lambda c, s: spec(channels.SelectiveKernel, width=c, paths=one(2, 3)),
    "split attention": lambda c, s: spec(
        channels.SplitAttention,
        width=c,
        radix=one(1, 2) if c % 4 == 0 else 1,
        groups=divisors(c, 2),
    ),
    "upsampling": lambda c, s: spec(
        space.Resample,
        inputs=c,
        outputs=WIDTHS,
        how=one("shuffle", "transposed", "transposed depthwise"),
    ),
    "response norm": lambda c, s: spec(
        image.ConvNormAct, inputs=c, outputs=WIDTHS, norm="response"
    ),
    "unfolded": lambda c, s: spec(space.Unfolded, width=c),
}
ODD_IMAGE_BLOCKS: Blocks = {
    "interleaved": lambda c, s: spec(
        channels.CrossStage, width=c, half=one(4, 3), how="every other"
    ),
    "single channels": lambda c, s: (
        spec(channels.Hierarchical, width=c, scales=c)
        | spec(channels.PartialConv, width=c, part=one(1, c - 1))
    ),
    "matrix product": lambda c, s: spec(
        odd.MatrixProduct, width=c, how=one("conv", "linear", "einsum")
    ),
    "positional": lambda c, s: spec(odd.Positional, width=c, how=one(*odd.POSITIONAL)),
    "training only": lambda c, s: spec(
        odd.TrainingOnly, width=c, how=one("more", "other", "another")
    ),
    "dynamic": lambda c, s: spec(odd.DynamicConv, width=c, experts=one(4, 2, 3)),
    "involution": lambda c, s: spec(odd.Involution, width=c, groups=divisors(c)),
    "frequencies": lambda c, s: spec(odd.Frequencies, width=c, size=s),
    "sequence": lambda c, s: spec(odd.Sequence, width=c, how=one("lstm", "gru", "rnn")),
    "reparametrized": lambda c, s: spec(
        odd.Reparametrized, width=c, how=one("weight norm", "tied", "standardized")
    ),
    "configured": lambda c, s: spec(
        odd.Configured, width=c, how=one("dictionary", "string", "closure")
    ),
}
TOKEN_NORMS = one("layer", "rms", "no affine", "none")
TOKEN_BLOCKS: Blocks = {
    "attention": lambda c, n: spec(
        attention.Attention,
        width=c,
        heads=divisors(c),
        order=one("3HD", "H3D", "D"),
        norm=TOKEN_NORMS,
        sdpa=BOTH,
    ),
    "plain keys": lambda c, n: spec(
        attention.Attention, width=c, heads=divisors(c), order="3HD", sdpa=BOTH, plain_keys=True
    ),
    "separate": lambda c, n: spec(
        attention.SeparateAttention,
        width=c,
        heads=divisors(c),
        joint_kv=BOTH,
        qk_norm=BOTH,
        output=one("width", "flatten"),
    ),
    "einsum": lambda c, n: spec(
        attention.EinsumAttention,
        width=c,
        heads=divisors(c),
        tokens=n,
        bias=one("HNN", "NNH", "index", "none"),
    ),
    "torch attention": lambda c, n: spec(
        attention.TorchAttention, width=c, heads=divisors(c), encoder=BOTH, norm_first=BOTH
    ),
    "key width": lambda c, n: spec(
        attention.ReducedAttention, width=c, heads=divisors(c), key_dim=one(2, 3, 4)
    ),
    "mlp": lambda c, n: spec(
        tokens.Mlp, width=c, how=one("plain", "swiglu", "glu"), norm=TOKEN_NORMS
    ),
    "mixer": lambda c, n: spec(tokens.Mixer, width=c, tokens=n, hidden=one(4, c, 6)),
    "local": lambda c, n: spec(tokens.LocalMlp, width=c),
    "along tokens": lambda c, n: spec(tokens.AlongTokens, width=c, depthwise=BOTH),
    "table": lambda c, n: spec(tokens.Table, width=c, tokens=n),
    "one module": lambda c, n: spec(tokens.OneModule, width=c, heads=divisors(c)),
    "thrice": lambda c, n: spec(
        attention.Attention, width=c, heads=divisors(c), order="HD3", sdpa=BOTH
    ),
    "fewer keys": lambda c, n: spec(
        attention.SeparateAttention,
        width=c,
        heads=st.just(4 if c % 4 == 0 else 2),
        kv_heads=one(1, 2),
    ),
    "talking heads": lambda c, n: spec(attention.TalkingAttention, width=c, heads=divisors(c)),
    "spatial gating": lambda c, n: spec(tokens.SpatialGating, width=c, tokens=n),
    "class attention": lambda c, n: spec(attention.LastToken, width=c, heads=divisors(c)),
    "rotary": lambda c, n: (
        spec(
            attention.RotaryAttention,
            width=c,
            tokens=n,
            heads=st.sampled_from([k for k in (2, 4, 1, 3) if c % (2 * k) == 0]),
        )
        if c % 2 == 0
        else spec(attention.LastToken, width=c, heads=1)
    ),
}
ODD_TOKEN_BLOCKS: Blocks = {
    "one head": lambda c, n: spec(
        attention.OneHead, width=c, scale=one("shape", "attribute", "none")
    ),
    "recurrent": lambda c, n: spec(tokens.Recurrent, width=c),
}

STAYING = {
    "stem depthwise",  # images do not widen
    "window",  # the others mix positions or pooled maps
    "mixer",
    "spatial gating",
    "spatial gate",
    "channel attention",
}
"""Kinds of which some kernels rightly stay as they are."""
