"""Choice of the output format by the ending of a path, and writing of a network in this format."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from gpd_cli.commands.exports.about import About
from gpd_cli.commands.exports.folder import FILES, check_replaceable, write_folder
from gpd_cli.commands.exports.onnx_file import check_packages, write_onnx
from gpd_cli.commands.exports.program import trace
from gpd_cli.errors import GpdError
from gpd_cli.files import atomic_path, check_folder, check_writable, json_text, save_tensors
from gpd_cli.models import needed_versions
from gpd_cli.models.numbers import wrong_numbers
from gpd_cli.teacher.compare import relative_difference

STATE_DICTS = (".safetensors", ".pth", ".pt")
PROGRAMS = (".pt2", ".onnx")
FORMS = (*STATE_DICTS, *PROGRAMS)
"""Endings of output files. A path that ends in a slash, or of an existing folder, is a folder."""
METADATA = "metadata.json"
"""Name of the metadata among the extra files of a ``.pt2`` file."""
_VERSIONS = (
    "loads",
    "after state._metadata = network.state_dict()._metadata, since its class needs versions, which "
    "this format does not store; a .pth file loads as it is",
)
_IMAGES = 4  # number of random images on which the written network is compared with the original


@dataclass(frozen=True)
class Options:
    """Options of an export.

    Args:
        preprocess: make resize, crop and normalization part of the program; for programs only.
        fuse: fold batch norms into the convolutions before them; for programs only.
        half: store weights in float16; programs also compute in float16.
    """

    preprocess: bool = False
    fuse: bool = False
    half: bool = False

    @property
    def changes(self) -> str:
        """A text that names the options that change the logits; empty if none does."""
        changes = {"folding batch norms": self.fuse, "rounding to float16": self.half}
        return " and ".join(change for change, is_chosen in changes.items() if is_chosen)


def is_folder(output: str) -> bool:
    """Whether an output path stands for a folder."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def check_output(output: str, options: Options) -> None:
    """Check, before any long work, that an output can be written; nothing is created.

    Args:
        output: the output path.
        options: options of the export.

    Raises:
        GpdError: when the output cannot be written, or an option does not apply to its format.
    """
    path = Path(output)
    if is_folder(output):
        check_folder(path, FILES)
        check_replaceable(path)
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
                    f"--{name} changes the network that runs, and {output} would contain weights "
                    f"only; write a .pt2 or .onnx file, or leave out --{name}."
                )
    elif path.suffix == ".onnx":
        check_packages()


def write_network(
    network: nn.Module, output: str, about: About, options: Options
) -> list[tuple[str, str]]:
    """Write a network atomically, in the format that the output path asks for.

    Args:
        network: the network, in eval mode.
        output: the output path, see `FORMS`.
        about: description of the network.
        options: options of the export.

    Returns:
        Facts about the output for the user, as pairs of title and text: the input of a program,
        and, if options change the logits, by how much.

    Raises:
        GpdError: when the network cannot be written in this format or in float16; then nothing is
            written.
    """
    path = Path(output)
    if options.half:
        _check_range(network)
    if is_folder(output) or path.suffix in STATE_DICTS:
        state = _state(network, options.half)
        rows = [_VERSIONS] if path.suffix == ".safetensors" and needed_versions(network) else []
        if options.half:
            holder = copy.deepcopy(network)
            holder.load_state_dict(state)
            images = torch.randn(_IMAGES, *about.shape, generator=torch.Generator().manual_seed(0))
            rows.append(_as_written(network, images, holder, images, options))
        if is_folder(output):
            write_folder(network, state, path, about, options.half)
        else:
            save_tensors(path, state, about.strings())
        return rows
    traced = trace(
        network, about, preprocess=options.preprocess, fuse=options.fuse, half=options.half
    )
    metadata = {**about.strings(), "input": traced.takes}
    if options.preprocess:
        metadata["preprocessing_inside"] = "true"
    rows = [("takes", f"{traced.takes} -> logits [batch, {about.spec.num_classes}]")]
    if options.changes:
        prepare = traced.module.prepare
        images = traced.sample if prepare is None else prepare(traced.sample)
        program = traced.program.module()
        rows.insert(0, _as_written(network, images, program, traced.sample, options))
    with atomic_path(path) as temporary:
        if path.suffix == ".onnx":
            write_onnx(traced, temporary, metadata, name=about.spec.name, half=options.half)
        else:
            extra = {METADATA: json_text(metadata)}
            content = BytesIO()  # torch's own file writer would abort the process on a full disk
            torch.export.save(traced.program, content, extra_files=extra)
            temporary.write_bytes(content.getbuffer())
    return rows


def _check_range(network: nn.Module) -> None:
    """Check that no weight and no running statistic of a network becomes infinite in float16.

    Raises:
        GpdError: when one does.
    """
    if (wrong := wrong_numbers(network, _state(network, half=True))) is not None:
        raise GpdError(
            f"In float16, whose largest number is {torch.finfo(torch.float16).max:.0f}, {wrong}; "
            "leave out --half."
        )


def _as_written(
    network: nn.Module, images: Tensor, written: nn.Module, given: Tensor, options: Options
) -> tuple[str, str]:
    """Compare the network that is to be written with the original, as a row of title and text.

    Args:
        network: the original network.
        images: images for the original network, ``[B, C, H, W]``.
        written: the network as it will be in the file.
        given: the same images in the input format of the network in the file.
        options: options of the export.

    Raises:
        GpdError: when numbers within the network become infinite in float16, although its weights
            do not.
    """
    with torch.no_grad():
        expected, logits = network(images), written(given)
    if options.half and not bool(logits.isfinite().all()):
        folding = " or --fuse_bn" if options.fuse else ""
        raise GpdError(
            f"In float16, whose largest number is {torch.finfo(torch.float16).max:.0f}, the "
            f"network's logits are NaN or infinite; leave out --half{folding}."
        )
    agreement = (logits.argmax(1) == expected.argmax(1)).float().mean()
    return "as written", (
        f"relative difference {relative_difference(logits, expected):.1g}, top-1 agreement "
        f"{agreement:.0%} on {len(images)} images"
    )


def _state(network: nn.Module, half: bool) -> dict[str, Tensor]:
    state = network.state_dict()
    if half:
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = value.half()
    return state
