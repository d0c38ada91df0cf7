"""`gpd expand`: inflate a student into a dynamic teacher and prove that nothing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpd_cli.branches import branch_names
from gpd_cli.checkpoint import Description, save_expanded
from gpd_cli.commands.report import cost, count, print_table
from gpd_cli.errors import GpdError
from gpd_cli.expansion import DEFAULT_NOISE, Storage, expand, merged_teacher
from gpd_cli.files import check_writable
from gpd_cli.models import ModelSpec, input_shape

_PROBE_BATCH = 4


def expand_command(
    output: Path,
    *,
    student: str,
    student_weights: str | None = None,
    student_args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    ratio: float = 2.0,
    branches: int | Sequence[str] = 6,
    noise: float = DEFAULT_NOISE,
    storage: Storage | None = None,
) -> None:
    """Expand a student, certify the result, write it and say what was done.

    Args:
        output: the file to write, ``.safetensors``.
        student: name of the network.
        student_weights: its state dict; random weights without one.
        student_args: further arguments of its constructor.
        num_classes: number of classes; by default the network's own.
        ratio: how many times as wide the dynamic teacher is.
        branches: see `gpd_cli.expand`.
        noise: see `gpd_cli.expand`.
        storage: see `gpd_cli.expand`; by default mixed.

    Raises:
        GpdError: in one sentence, for everything a user can mend; nothing is written then.
    """
    if output.suffix != ".safetensors":
        raise GpdError(f"The output {output} must end in .safetensors.")
    check_writable(output)
    names = branch_names(branches)
    spec = ModelSpec(student, num_classes, dict(student_args or {}))
    network = spec.build(student_weights)
    shape = input_shape(network, spec.name, spec.model_args)
    pair = expand(
        network,
        sample=torch.zeros(_PROBE_BATCH, *shape),
        ratio=ratio,
        branches=branches,
        noise=noise,
        storage=storage or "mixed",
    )
    save_expanded(
        output,
        pair,
        Description(spec.resolve(network), pair.plan, shape, names, storage or "mixed"),
    )
    before, certificate = cost(network, shape), pair.certificate
    assert certificate is not None
    after = cost(merged_teacher(pair), shape)
    trained = sum(p.numel() for p in pair.parameters())
    widened = {name.rpartition(".")[0] for name, _ in pair.plan}
    branched = sum(1 for name, _ in pair.named_modules() if name.endswith(".branches"))
    print_table(
        f"Expanded {student} at ratio {ratio:g}",
        [
            ("parameters", f"{count(before.parameters)} -> {count(after.parameters)} merged"),
            ("trainable", f"{count(trained)} with branches"),
            ("multiply-adds", f"{count(before.macs)} -> {count(after.macs)}"),
            ("widened layers", str(len(widened))),
            ("branches", f"{1 + len(names)} on each of {branched} kernels"),
            (
                "certificate",
                f"relative difference {certificate.difference:.1e} in float64, "
                f"top-1 agreement {certificate.agreement:.0%} on {certificate.images} images",
            ),
            ("weights", "random" if student_weights is None else str(student_weights)),
            ("file", str(output)),
        ],
    )
