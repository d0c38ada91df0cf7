"""`gpd extract`: extract the student from the dynamic teacher and write it for deployment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gpd_cli.branches import count_branches
from gpd_cli.commands.report import cost, count, print_table
from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files import atomic_path, check_writable, save_tensors
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.checkpoint import Description, Weights, load_chosen
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair

Which = Literal["student", "teacher"]
STATE_DICTS = (".safetensors", ".pth", ".pt")
PROGRAMS = (".pt2", ".onnx")
_IMAGES = 4  # number of random images for the comparison
_ROUNDING = 1e-4  # tolerated relative difference in float32


def extract_command(
    ckpt_path: Path, output: Path, which: Which = "student", weights: Weights = "ema"
) -> None:
    """Extract a plain network, compare it with the trained network, and write it.

    Args:
        ckpt_path: a file of `fit` or `expand`.
        output: the file to write: a state dict (``.safetensors``, ``.pth``, ``.pt``), or a program
            that needs no source code (``.pt2`` of torch.export, ``.onnx``).
        which: the student, or the merged dynamic teacher.
        weights: averaged weights (ema) where the run has an average that has begun, or the trained
            weights (raw).

    Raises:
        GpdError: for every error that a user can fix; then nothing is written.
    """
    if output.suffix not in STATE_DICTS + PROGRAMS:
        raise GpdError(
            f"The output {output} must end in one of {', '.join(STATE_DICTS + PROGRAMS)}."
        )
    check_writable(output)
    network, description, taken = load_chosen(ckpt_path, weights)
    if which == "teacher" and isinstance(network, Alone):
        raise GpdError(f"{ckpt_path} holds a student trained alone: there is no teacher in it.")
    extracted = _extract(network, which)
    shape = description.shape
    certificate = _check(network, extracted, which, shape)
    _write(extracted, output, description, which, shape)
    whole = sum(p.numel() for p in network.parameters())
    after = cost(extracted, shape)
    before = cost(merged_teacher(network), shape) if isinstance(network, Pair) else after
    widened = {name.rpartition(".")[0] for name, _ in description.plan or ()}
    exact = "bit for bit" if certificate.difference == 0 else "up to rounding"
    print_table(
        f"Extracted {_title(description, which)}",
        [
            ("parameters", f"{count(whole)} trained -> {count(after.parameters)}"),
            ("multiply-adds", f"{count(before.macs)} -> {count(after.macs)}"),
            ("widened layers", str(len(widened))),
            ("branches", f"{count_branches(description.branches)} merged"),
            (
                "certificate",
                f"equal to the trained network {exact} (relative difference "
                f"{certificate.difference:.1g}), top-1 agreement {certificate.agreement:.0%} on "
                f"{certificate.images} images",
            ),
            *([] if taken is None else [("weights", taken)]),
            ("file", str(output)),
        ],
    )


def _extract(network: Pair | Alone, which: Which) -> nn.Module:
    if which == "teacher" and isinstance(network, Pair):
        return merged_teacher(network).eval()
    return network.extract().eval()


def _check(
    network: Pair | Alone, extracted: nn.Module, which: Which, shape: tuple[int, ...]
) -> Certificate:
    """Compare the trained network with the extracted one; any difference of a student is a bug."""
    images = torch.randn(_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = network.student(images) if which == "student" else network(images)[1]
        assert trained is not None
        written = extracted(images)
    difference = relative_difference(written, trained)
    # For plain parameters, as the merged teacher has, torch may choose other matrix kernels.
    if not difference <= (0 if which == "student" else _ROUNDING):
        raise WeightsError(
            f"The extracted {which} differs from the trained one by {difference:.1e}; nothing was "
            "written, please report this."
        )
    agreement = (written.argmax(1) == trained.argmax(1)).float().mean()
    return Certificate(difference, float(agreement), len(images))


def _write(
    network: nn.Module,
    output: Path,
    description: Description,
    which: Which,
    shape: tuple[int, ...],
) -> None:
    metadata = {"format": "pt", "model": json.dumps(description.spec.to_dict()), "network": which}
    if output.suffix in STATE_DICTS:
        save_tensors(output, network.state_dict(), metadata)
        return
    images = torch.zeros(2, *shape)
    batch = torch.export.Dim("batch", min=1)
    with atomic_path(output) as temporary:
        if output.suffix == ".pt2":
            program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
            torch.export.save(program, temporary)
        else:
            _export_onnx(network, images, temporary)


def _export_onnx(network: nn.Module, images: torch.Tensor, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise GpdError(
            "Writing ONNX needs further packages: pip install 'gpd-cli[onnx]'."
        ) from error
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        network,
        (images,),
        str(path),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def _title(description: Description, which: Which) -> str:
    name = description.spec.name
    return name if which == "student" else f"the merged dynamic teacher of {name}"
