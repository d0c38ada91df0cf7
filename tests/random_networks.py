"""Random small networks, as users would write them, drawn by hypothesis."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from blocks import ends, tokens
from blocks.catalogue import (
    IMAGE_BLOCKS,
    ODD_IMAGE_BLOCKS,
    ODD_TOKEN_BLOCKS,
    STAYING,
    TOKEN_BLOCKS,
    WIDTHS,
    Blocks,
    Spec,
    one,
    spec,
)
from gpd_cli.widening.running.randomize import randomize

RATIOS = (2.0, 3.0, 4.0)
ODD_RATIOS = (1.5, 2.5, 1.25)
BRANCHES = (1, 3, 6, ("1xk", "kx1"))
OF_THE_AUTHORS = {"zero": (*BRANCHES, "gpd"), "gpd": (1, 4, 6)}


@dataclass(frozen=True)
class Case:
    """One expansion: a network, and what is asked for.

    Args:
        network: what holds the layers.
        layers: from stem to head.
        size: height and width of the images.
        batch: number of images in the sample.
        ratio: the expansion ratio.
        branches: how many branches, or which.
        branch_layers: which layers get them.
        storage: at what scale weights are stored.
        branch_init: where the branches' gates start.
        width_multiple: what wide widths are rounded up to.
        seed: of the weights.
        usual: whether a refusal is a failure.
        kinds: what the layers are called in the catalogue.
    """

    network: Spec
    layers: tuple[Spec, ...]
    size: int
    batch: int
    ratio: float
    branches: int | str | tuple[str, ...]
    branch_layers: str
    storage: str
    branch_init: str
    width_multiple: int
    seed: int
    usual: bool
    kinds: tuple[str, ...] = ()

    @property
    def least(self) -> float:
        """The part of the kernels that has to widen."""
        return 0.6 if self.usual and not STAYING & {*self.kinds} else 0.0

    def build(self) -> nn.Module:
        """The network in float64, its weights random, its gates and statistics as well."""
        torch.manual_seed(self.seed)
        layers = (layer.build() for layer in self.layers)
        network = self.network.cls(*layers, **self.network.kwargs).double()
        randomize(network, torch.Generator().manual_seed(self.seed))
        return network


class _Layers:
    """Layers drawn one after the other, each to fit the output of those before it."""

    def __init__(self, draw: st.DrawFn, size: int, usual: bool) -> None:
        self.draw, self.usual = draw, usual
        self.x = torch.zeros(2, 3, size, size)
        self.specs: list[Spec] = []
        self.kinds: list[str] = []

    def add(self, kind: str, strategy: SearchStrategy[Spec]) -> None:
        layer = self.draw(strategy)
        with torch.no_grad():
            self.x = layer.build()(self.x)
        self.specs.append(layer)
        self.kinds.append(kind)

    def add_blocks(self, blocks: Blocks, odd_blocks: Blocks) -> None:
        blocks = blocks if self.usual else {**odd_blocks, **blocks}
        for _ in range(self.draw(st.integers(1, 3))):
            # Channels and height of an image, width and number of tokens.
            width, size = self.x.shape[1:3] if self.x.ndim == 4 else (*self.x.shape[:0:-1],)
            if size < 2:
                return  # too small for padding, pooling, windows
            kind = self.draw(one(*blocks))
            self.add(kind, blocks[kind](width, size))

    def add_tokens(self) -> None:
        self.add(
            "tokens",
            spec(ends.ToTokens, width=self.x.shape[1], how=one("flatten", "pool", "permute")),
        )
        if self.draw(st.booleans()):
            shapes = one("[1,N,D]", "[N,D]", "[D]")
            _, count, width = self.x.shape
            embedding = spec(
                tokens.Embedding,
                width=width,
                tokens=count,
                cls=st.booleans(),
                pos=shapes,
                buffer=st.booleans(),
            )
            self.add("embedding", embedding)


@st.composite
def cases(draw: st.DrawFn, usual: bool | None = None) -> Case:
    """Random cases.

    Args:
        draw: given by hypothesis.
        usual: whether all building blocks and the ratio are such as have to work; drawn by default.
    """
    if usual is None:
        usual = draw(one(True, True, False))
    size = draw(one(8, 16, 12))
    layers = _Layers(draw, size, usual)
    stem = draw(one(*ends.STEMS))
    layers.add(f"stem {stem}", spec(ends.STEMS[stem], width=WIDTHS))
    width = layers.x.shape[1]
    kind = draw(one("image", "tokens", "both"))
    if kind != "tokens":
        layers.add_blocks(IMAGE_BLOCKS, ODD_IMAGE_BLOCKS)
    if kind != "image":
        layers.add_tokens()
        layers.add_blocks(TOKEN_BLOCKS, ODD_TOKEN_BLOCKS)
    heads = ends.IMAGE_HEADS if layers.x.ndim == 4 else ends.TOKEN_HEADS
    head = draw(one(*heads))
    shape = st.just(tuple(layers.x.shape[1:]))
    layers.add(f"head {head}", spec(heads[head], shape=shape, classes=one(5, 4, 8, 3)))
    branch_init = draw(one("zero", "zero", "orepa", "gpd"))
    return Case(
        network=draw(
            spec(ends.Plain) | spec(ends.Listed) | spec(ends.Named) | spec(ends.Owner, width=width)
        ),
        layers=tuple(layers.specs),
        size=size,
        batch=draw(one(2, 4, 1)),
        ratio=draw(one(*RATIOS) if usual else one(*ODD_RATIOS, *RATIOS)),
        branches=draw(one(*(BRANCHES if branch_init == "orepa" else OF_THE_AUTHORS[branch_init]))),
        branch_layers=draw(one("all", "all", "3x3_stride1")),
        storage=draw(one("mixed", "student", "teacher")),
        branch_init=branch_init,
        width_multiple=1 if usual else draw(one(1, 1, 8)),
        seed=draw(st.integers(0, 99)),
        usual=usual,
        kinds=tuple(layers.kinds),
    )
