"""Which format an output path asks for, and writing it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from gpd_cli.commands.exports.about import About
from gpd_cli.commands.exports.folder import FILES, write_folder
from gpd_cli.commands.exports.onnx_file import check_packages, write_onnx
from gpd_cli.commands.exports.program import trace
from gpd_cli.errors import GpdError
from gpd_cli.files import atomic_path, check_folder, check_writable, save_tensors

STATE_DICTS = (".safetensors", ".pth", ".pt")
PROGRAMS = (".pt2", ".onnx")
FORMS = (*STATE_DICTS, *PROGRAMS)
"""Endings of files; a path that ends in a slash, or that of a folder, is a folder."""
METADATA = "metadata.json"
"""Name of the metadata among a ``.pt2`` file's extra files."""


@dataclass(frozen=True)
class Options:
    """How to export.

    Args:
        preprocess: put resize, crop and normalization inside; programs only.
        fuse: fold batch norms into the convolutions before them; programs only.
        half: weights in float16; programs compute in it.
    """

    preprocess: bool = False
    fuse: bool = False
    half: bool = False


def is_folder(output: str) -> bool:
    """Whether a path asks for a folder."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def check_output(output: str, options: Options) -> None:
    """Find out before long work whether an output could be written; creates nothing.

    Args:
        output: the path.
        options: how to export.

    Raises:
        GpdError: when it could not.
    """
    path = Path(output)
    if is_folder(output):
        check_folder(path, FILES)
    elif path.suffix not in FORMS:
        raise GpdError(
            f"The output {output} must end in one of {', '.join(FORMS)}, or in a slash for a "
            "folder."
        )
    else:
        check_writable(path)
    if is_folder(output) or path.suffix in STATE_DICTS:
        for chosen, name in ((options.preprocess, "preprocess"), (options.fuse, "fuse_bn")):
            if chosen:
                raise GpdError(
                    f"--{name} changes the network that runs, and {output} would hold weights "
                    "alone; write a .pt2 or .onnx file, or leave it out."
                )
    elif path.suffix == ".onnx":
        check_packages()


def write_network(network: nn.Module, output: str, about: About, options: Options) -> list[str]:
    """Write a network, atomically.

    Args:
        network: in eval mode.
        output: the path, see `FORMS`.
        about: what the network is.
        options: how to export.

    Returns:
        What to tell about the output, such as what a program takes.

    Raises:
        GpdError: when the format cannot hold the network; nothing is written then.
    """
    path = Path(output)
    if is_folder(output):
        write_folder(network, _state(network, options.half), path, about, options.half)
        return []
    if path.suffix in STATE_DICTS:
        save_tensors(path, _state(network, options.half), about.strings())
        return []
    traced = trace(
        network, about, preprocess=options.preprocess, fuse=options.fuse, half=options.half
    )
    metadata = {**about.strings(), "input": traced.takes}
    if options.preprocess:
        metadata["preprocessing_inside"] = "true"
    with atomic_path(path) as temporary:
        if path.suffix == ".onnx":
            write_onnx(traced, temporary, metadata, name=about.spec.name, half=options.half)
        else:
            extra = {METADATA: json.dumps(metadata, ensure_ascii=False)}
            content = BytesIO()  # on a full disk, torch's writer would abort the process
            torch.export.save(traced.program, content, extra_files=extra)
            temporary.write_bytes(content.getbuffer())
    return [f"{traced.takes} -> logits [batch, {about.spec.num_classes}]"]


def _state(network: nn.Module, half: bool) -> dict[str, Tensor]:
    state = network.state_dict()
    if half:
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = value.half()
    return state
