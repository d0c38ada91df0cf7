"""Tracing of a network by torch.export, to a program that runs without source code."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gpd_cli.commands.exports.about import About
from gpd_cli.commands.exports.fuse import fuse_batch_norms
from gpd_cli.commands.exports.preprocess import FILTERS, Prepare
from gpd_cli.errors import GpdError

_SAMPLES = 2  # images to trace with; torch.export would treat a batch size of 1 as a constant


class Program(nn.Module):
    """The module that is traced: a network, with preprocessing and half precision if chosen.

    Args:
        network: a plain network, which is not changed.
        prepare: preprocessing to run before the network; None for none.
        half: whether the network computes in float16; input and output keep their types.
    """

    def __init__(self, network: nn.Module, prepare: Prepare | None, half: bool) -> None:
        super().__init__()
        self.half_precision = half
        self.network = copy.deepcopy(network).half() if half else network
        self.prepare = prepare

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[B, classes]`` of images, in the input format of the program."""
        if self.prepare is not None:
            images = self.prepare(images)
        if not self.half_precision:
            return cast(Tensor, self.network(images))
        return cast(Tensor, self.network(images.half())).float()


@dataclass(frozen=True)
class Traced:
    """A traced network.

    Args:
        module: the module that was traced, to compare outputs with.
        program: the traced program.
        sample: a batch of inputs for the program.
        shapes: the dynamic axes of the input, in the form of torch.export's ``dynamic_shapes``.
        takes: a description of the program's input, for users.
    """

    module: Program
    program: ExportedProgram
    sample: Tensor
    shapes: tuple[dict[int, Any], ...]
    takes: str


def trace(network: nn.Module, about: About, *, preprocess: bool, fuse: bool, half: bool) -> Traced:
    """Trace a network with a dynamic batch size.

    Args:
        network: the network, in eval mode.
        about: description of the network.
        preprocess: whether resize, crop and normalization become part of the program.
        fuse: whether to fold batch norms into convolutions.
        half: whether the network computes in float16.

    Raises:
        GpdError: when the preprocessing is not known, or torch cannot trace the network.
    """
    prepare = _preparation(about) if preprocess else None
    module = Program(network, prepare, half).eval()
    channels, height, width = about.shape
    batch = Dim("batch", min=1)
    if prepare is None:
        sample = torch.randn(_SAMPLES, *about.shape, generator=torch.Generator().manual_seed(0))
        shapes: tuple[dict[int, Any], ...] = ({0: batch},)
        takes = f"float32 [batch, {channels}, {height}, {width}], normalized"
    else:
        # Height and width differ from each other and from the network's image size, since
        # torch.export would otherwise tie the dynamic sizes to each other or make them constants.
        sides = (height + 3, width + 5)
        sample = torch.randint(
            256, (_SAMPLES, *sides, channels), generator=torch.Generator().manual_seed(0)
        ).to(torch.uint8)
        shapes = ({0: batch, 1: Dim("height", min=1), 2: Dim("width", min=1)},)
        takes = f"uint8 [batch, height, width, {channels}], as in Pillow images"
    try:
        with torch.no_grad():
            program = torch.export.export(module, (sample,), dynamic_shapes=shapes)
            if fuse:
                graph = program.module()
                assert isinstance(graph, torch.fx.GraphModule)
                fuse_batch_norms(graph)
                program = torch.export.export(graph, (sample,), dynamic_shapes=shapes)
    except Exception as error:  # torch raises many types for networks that it cannot trace
        reason = " ".join(str(error).split("\n\n")[0].split())[:200].rstrip(".")
        raise GpdError(
            f"torch.export cannot trace {about.spec.name} ({reason}); write a .safetensors file of "
            "its weights instead."
        ) from error
    for graph_module in program.graph_module.modules():
        if isinstance(graph_module, torch.fx.GraphModule):
            for node in graph_module.graph.nodes:
                node.meta.pop("stack_trace", None)  # contains paths of this machine
    return Traced(module, program, sample, shapes, takes)


def _preparation(about: About) -> Prepare:
    known = about.preprocessing
    if known is None:
        raise GpdError(
            "The checkpoint does not say how images were prepared, as checkpoints of gpd fit do; "
            "leave out --preprocess."
        )
    if known["interpolation"] not in FILTERS:
        raise GpdError(
            f"--preprocess does not support the interpolation '{known['interpolation']}'; leave "
            "out --preprocess."
        )
    size = (about.shape[1], about.shape[2])
    return Prepare(size, known["mean"], known["std"], known["crop_pct"], known["interpolation"])
