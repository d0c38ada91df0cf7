"""`gpd extract`: extract the student from the dynamic teacher and write it for deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpd_cli.branches import count_branches
from gpd_cli.commands.authors_checkpoint import read_authors
from gpd_cli.commands.exports import (
    About,
    Options,
    Which,
    check_output,
    is_folder,
    write_network,
)
from gpd_cli.commands.exports.arguments import building_arguments
from gpd_cli.commands.exports.card import facts_of_run, settings_of_run
from gpd_cli.commands.summary_table import Cost, cost, count, print_table
from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files import check_not_input
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.checkpoint import Weights, load_chosen, read_run
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.teacher.description import Description
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair

_IMAGES = 4  # number of random images on which trained and extracted network are compared
_ROUNDING = 1e-4  # tolerated relative difference of the merged teacher's logits in float32


def extract_command(
    ckpt_path: Path,
    output: str,
    which: Which = "student",
    weights: Weights = "ema",
    preprocess: bool = False,
    fuse_bn: bool = False,
    half: bool = False,
) -> None:
    """Extract a plain network, compare it with the trained network, and write it.

    Args:
        ckpt_path: a file of `fit` or `expand`, or a checkpoint of the paper's authors' code.
        output: path to write, whose ending chooses the form: a folder for timm (a path that ends in
            a slash), a state dict (``.safetensors``, ``.pth``, ``.pt``), or a program that runs
            without source code (``.pt2`` of torch.export, ``.onnx``).
        which: the network to extract: the student, or the merged dynamic teacher.
        weights: the averaged weights (ema), if the run has an average and it has begun, or the
            trained weights (raw).
        preprocess: make resize, crop and normalization a part of the program, which then takes the
            bytes of Pillow images; for ``.pt2`` and ``.onnx``.
        fuse_bn: fold batch norms into the convolutions before them; for ``.pt2`` and ``.onnx``.
        half: store weights in float16; a program also computes in float16, with input and output
            types unchanged.

    Raises:
        GpdError: for every error that a user can fix; then nothing is written.
    """
    output, options = str(output), Options(preprocess, fuse_bn, half)
    check_not_input(output, ckpt_path, "--ckpt_path")
    check_output(output, options)
    foreign = read_authors(ckpt_path, weights)
    network, description, taken = foreign or load_chosen(ckpt_path, weights)
    if which == "teacher" and isinstance(network, Alone):
        why = "was trained alone" if foreign is None else "is read without its teacher"
        raise GpdError(f"{ckpt_path} contains a student that {why}; leave out --which teacher.")
    extracted = _extract(network, which)
    shape = description.shape
    certificate = _check(network, extracted, which, shape)
    after = cost(extracted, shape)
    about = About(description.spec, which, shape, description.images)
    about = replace(about, arguments=_arguments(network, extracted, description, which))
    if is_folder(output):  # the only output with a model card
        content = {}
        if foreign is None and ckpt_path.suffix != ".safetensors":
            content = read_run(ckpt_path)
        facts = _facts(content, ckpt_path, output, which, weights, half, taken, after)
        settings, left_out = settings_of_run(content) if content else ("", "")
        about = replace(about, facts=facts, settings=settings, left_out=left_out)
    written = write_network(extracted, output, about, options)
    whole = sum(p.numel() for p in network.parameters())
    before = cost(merged_teacher(network), shape) if isinstance(network, Pair) else after
    widened = {name.rpartition(".")[0] for name, _ in description.plan or ()}
    exact = "bit for bit" if certificate.difference == 0 else "up to rounding"
    before_changes = f"before {options.changes} " if options.changes else ""
    trained = [
        ("parameters", f"{count(whole)} trained -> {count(after.parameters)}"),
        ("multiply-adds", f"{count(before.macs)} -> {count(after.macs)}"),
        ("widened layers", str(len(widened))),
        ("branches", f"{count_branches(description.branches)} merged"),
        (
            "certificate",
            f"{before_changes}equal to the trained network {exact} (relative difference "
            f"{certificate.difference:.1g}), top-1 agreement {certificate.agreement:.0%} on "
            f"{certificate.images} images",
        ),
    ]
    cut_here = [("parameters", count(after.parameters)), ("multiply-adds", count(after.macs))]
    print_table(
        f"Extracted {_title(description, which)}",
        [
            *(trained if foreign is None else cut_here),
            *([] if taken is None else [("weights", taken)]),
            *_notes(about),
            *written,
            ("file", output),
        ],
    )


def _extract(network: Pair | Alone, which: Which) -> nn.Module:
    if which == "teacher" and isinstance(network, Pair):
        return merged_teacher(network).eval()
    return network.extract().eval()


def _check(
    network: Pair | Alone, extracted: nn.Module, which: Which, shape: tuple[int, ...]
) -> Certificate:
    """Compare the logits of the trained and the extracted network on random images.

    An extracted student has to be equal bit for bit; a merged teacher may differ by rounding.

    Args:
        network: the trained network.
        extracted: the extracted network.
        which: which network was extracted.
        shape: shape of an image, ``(C, H, W)``.

    Raises:
        WeightsError: when the networks differ, or the logits are NaN or infinite.
    """
    images = _images(shape)
    with torch.no_grad():
        trained = network.student(images) if which == "student" else network(images)[1]
        assert trained is not None
        written = extracted(images)
    if not bool(trained.isfinite().all()):
        raise WeightsError(
            f"The {which} gives NaN or infinite logits on random images, so that it cannot be "
            "checked and nothing was written; give another checkpoint of the run."
        )
    difference = relative_difference(written, trained)
    # Torch may choose other matrix kernels for the merged teacher, whose parameters are plain ones.
    if not difference <= (0 if which == "student" else _ROUNDING):
        raise WeightsError(
            f"The extracted {which} differs from the trained one by {difference:.1e}, so nothing "
            "was written; please report this."
        )
    agreement = (written.argmax(1) == trained.argmax(1)).float().mean()
    return Certificate(difference, float(agreement), len(images))


def _images(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(_IMAGES, *shape, generator=torch.Generator().manual_seed(0))


def _arguments(
    network: Pair | Alone, extracted: nn.Module, description: Description, which: Which
) -> dict[str, object] | None:
    """Constructor arguments that build the extracted network; None if no arguments do."""
    spec = description.spec
    if which == "student" or not isinstance(network, Pair):
        return spec.model_args
    images = _images(description.shape)
    ratio = network.plan.ratio
    return building_arguments(extracted, network.extract(), spec, ratio, images)


def _facts(
    content: Mapping[str, Any],
    ckpt_path: Path,
    output: str,
    which: Which,
    weights: Weights,
    half: bool,
    taken: str | None,
    after: Cost,
) -> dict[str, str]:
    """Facts for the model card, by title."""
    facts = facts_of_run(content, averaged=taken in (None, "averaged")) if content else {}
    if taken is not None:
        facts["weights"] = taken
    facts["parameters"] = f"{after.parameters:,}"
    facts["multiply-adds"] = f"{after.macs:,} for an image"
    command = f"gpd extract --ckpt_path {ckpt_path.name} --output {Path(output).name}/"
    options = {" --which teacher": which == "teacher", " --weights raw": weights == "raw"}
    options[" --half"] = half
    chosen = "".join(option for option, is_chosen in options.items() if is_chosen)
    facts["command"] = f"`{command}{chosen}`"
    return facts


def _notes(about: About) -> list[tuple[str, str]]:
    """Rows of the summary about what is unknown, and about how to build a wide network."""
    notes = []
    if about.network == "teacher":
        name = about.spec.name
        if about.building_arguments is None:
            text = (
                f"no arguments of {name} build this network; .pt2 and .onnx run without source code"
            )
        else:
            given = ", ".join(f"{key}={value}" for key, value in about.building_arguments.items())
            text = f"{name}({given})"
        notes.append(("architecture", text))
    if not about.has_class_names:
        notes.append(("classes", f"{about.spec.num_classes}, without names"))
    if about.preprocessing is None:
        notes.append(("preprocessing", "not in the checkpoint"))
    return notes


def _title(description: Description, which: Which) -> str:
    name = description.spec.name
    return name if which == "student" else f"the merged dynamic teacher of {name}"
