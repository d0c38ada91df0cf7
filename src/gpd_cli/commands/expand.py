"""`gpd expand`: inflate a student into a dynamic teacher, and certify that both are equal.

A dry run only prints the width plan, and builds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from gpd_cli.branches import BranchInit, branch_names, count_branches, layers_in_vain
from gpd_cli.commands.summary_table import cost, count, print_table
from gpd_cli.errors import GpdError, no_effect
from gpd_cli.files import atomic_path, check_not_input, check_writable
from gpd_cli.models import ModelSpec, check_images, input_shape, wants_published
from gpd_cli.package_version import gpd_version
from gpd_cli.teacher.checkpoint import save_expanded
from gpd_cli.teacher.description import Description
from gpd_cli.teacher.expansion import DEFAULT_NOISE, expand
from gpd_cli.teacher.layer_patterns import layer_patterns
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.checks import check_start
from gpd_cli.training.remarks import changed_branch_settings
from gpd_cli.widening.describe import plan_text
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.tensors import Storage

_PROBE_BATCH = 2


def expand_command(
    output: Path | None,
    *,
    student: str,
    student_weights: str | None = None,
    student_args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    ratio: float = 2.0,
    branches: int | str | Sequence[str] = 1,
    noise: float = DEFAULT_NOISE,
    storage: Storage | None = None,
    exclude: str | Sequence[str] | None = None,
    width_multiple: int = 1,
    branch_layers: str | Sequence[str] = "all",
    branch_init: BranchInit = "zero",
    branch_width: float = 1.0,
    plan: Path | None = None,
) -> None:
    """Expand a student, certify and write the result, and print a summary.

    Args:
        output: path of the file to write, ``.safetensors``; None for a dry run, which prints the
            width plan and builds nothing.
        student: name of the student.
        student_weights: file with the student's state dict; by default random weights.
        student_args: further arguments of the student's constructor.
        num_classes: number of classes; by default the number that the student is built with.
        image_size: height and width of the images, in pixels; by default the student's own.
        ratio: how many times as wide the dynamic teacher is.
        branches: how many of the paper's six branches each layer has, counting the main kernel (1
            is the main kernel alone); or names of branches or of published blocks.
        noise: standard deviation of the zero-sum noise that lets the copies of a channel diverge,
            relative to the standard deviation of each weight; the noise changes no output.
        storage: the scale at which shared weights are stored; by default mixed.
        exclude: patterns of names of layers whose output channels are not widened.
        width_multiple: the teacher's widths are rounded up to a multiple of this number.
        branch_layers: which layers get branches: ``all``, ``3x3_stride1``, or patterns of names.
        branch_init: initial values of the branches: ``zero``, ``orepa`` or ``gpd``.
        branch_width: number of inner channels of the ``1x1_kxk`` branch, as a multiple of the
            number in the paper.
        plan: path of a file for the width plan as readable text (YAML); by default none is written.

    Raises:
        GpdError: for every error that a user can fix; then nothing is written.
    """
    _check_paths(output, plan)
    for path in (output, plan):
        if path is not None and student_weights is not None:
            check_not_input(path, student_weights, "--model.student_weights")
    published = wants_published(student, student_args)
    names, layers = branch_names(branches, branch_init), layer_patterns(branch_layers)
    check_start(student_weights or published, names, branch_init)
    in_vain = [] if names else changed_branch_settings(layers, branch_init, branch_width)
    excluded = layer_patterns(exclude)
    spec = ModelSpec(student, num_classes, dict(student_args or {}))
    network = spec.build(student_weights)
    shape = input_shape(network, spec.name, spec.model_args)
    if image_size is not None:
        shape = (shape[0], image_size, image_size)
        check_images(network, shape, "--model.student_args")
    if remark := layers_in_vain(network, names, layers):
        rank_zero_info(remark)
    resolved = spec.resolve(network, None if image_size is None else shape)
    sample = torch.zeros(_PROBE_BATCH, *shape)

    def text(found: WidthPlan) -> str:
        heading = _heading(spec, shape, excluded, width_multiple)
        return plan_text(found, network, heading)

    if output is None:
        found = find_plan(network, sample, ratio, exclude=excluded, width_multiple=width_multiple)
        _write_plan(plan, text(found))
        print(text(found), end="")
        return
    pair = expand(
        network,
        sample=sample,
        ratio=ratio,
        branches=branches,
        noise=noise,
        storage=storage or "mixed",
        exclude=excluded,
        width_multiple=width_multiple,
        branch_layers=layers,
        branch_init=branch_init,
        branch_width=branch_width,
    )
    description = Description(
        resolved,
        pair.plan,
        shape,
        names,
        storage or "mixed",
        layers,
        branch_width=branch_width,
    )
    save_expanded(output, pair, description)
    _write_plan(plan, text(pair.plan))
    files = [("file", str(output)), *([] if plan is None else [("plan", str(plan))])]
    weights = str(student_weights or ("published" if published else "random"))
    print_table(
        f"Expanded {student} at ratio {ratio:g}",
        [*_facts(pair, network, shape, names, in_vain), ("weights", weights), *files],
    )


def _check_paths(output: Path | None, plan: Path | None) -> None:
    if output is not None:
        if output.suffix != ".safetensors":
            raise GpdError(f"The output {output} must end in .safetensors.")
        check_writable(output)
    if plan is not None:
        if output is not None and plan.resolve() == output.resolve():
            raise GpdError(f"--plan and --output are both {plan}; give two different paths.")
        check_writable(plan)


def _heading(
    spec: ModelSpec, shape: tuple[int, ...], exclude: Sequence[str], width_multiple: int
) -> dict[str, Any]:
    """Head of a plan's text: the network, and the options that the plan was made with."""
    return {
        "network": spec.name,
        **({"arguments": spec.model_args} if spec.model_args else {}),
        **({"classes": spec.num_classes} if spec.num_classes else {}),
        "images": " x ".join(map(str, shape)),
        "gpd": gpd_version(),
        **({"exclude": list(exclude)} if exclude else {}),
        **({"width_multiple": width_multiple} if width_multiple > 1 else {}),
    }


def _write_plan(path: Path | None, text: str) -> None:
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _facts(
    pair: Pair,
    network: nn.Module,
    shape: tuple[int, int, int],
    names: Sequence[str],
    in_vain: Sequence[str],
) -> list[tuple[str, str]]:
    """Rows of the summary, which compare the network before and after expansion.

    Args:
        pair: student and dynamic teacher.
        network: the student as a plain network.
        shape: shape of the student's images, ``(C, H, W)``.
        names: names of the branches.
        in_vain: names of branch options that have no effect.

    Returns:
        Pairs of title and text.
    """
    before, certificate = cost(network, shape), pair.certificate
    assert certificate is not None
    after = cost(network, shape, pair.plan)
    trained = sum(p.numel() for p in pair.parameters())
    widened = {name.rpartition(".")[0] for name, _ in pair.plan}
    branched = sum(1 for name, _ in pair.named_modules() if name.endswith(".branches"))
    branches = f"up to {count_branches(names)} on each of {branched} kernels" if names else "none"
    if in_vain:
        branches += f"; {no_effect('model', in_vain)}"
    return [
        ("parameters", f"{count(before.parameters)} -> {count(after.parameters)} merged"),
        ("trainable", count(trained) + (" with branches" if names else "")),
        ("multiply-adds", f"{count(before.macs)} -> {count(after.macs)}"),
        ("widened layers", str(len(widened))),
        *(("narrow inside", f"{name}: {reason}") for name, reason in pair.plan.kept_narrow.items()),
        ("branches", branches),
        (
            "certificate",
            f"relative difference {certificate.difference:.1e} in float64, "
            f"top-1 agreement {certificate.agreement:.0%} on {certificate.images} images"
            f"{'' if certificate.in_training is not None else '; not compared in train mode'}",
        ),
    ]
