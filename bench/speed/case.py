"""The rows of the benchmark, each of which is a student, its dynamic teacher and a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

SAVING = ("recompute_student", "grad_checkpointing")


@dataclass(frozen=True)
class Case:
    """A row of the benchmark: networks, batch and options that are timed.

    Args:
        student: name of the student, as `gpd fit` takes it.
        size: height and width of the images in pixels.
        batch: number of images in a batch.
        branches: number of branches, see `gpd_cli.expand`.
        branch_width: width of the 1x1_kxk branch, see `gpd_cli.expand`.
        ratio: expansion ratio, see `gpd_cli.expand`.
        precision: ``32``, or ``bf16`` for autocast to bfloat16.
        channels_last: whether kernels and images are in channels-last memory format.
        compile: whether the networks are compiled with torch.compile.
        saving: the option that saves memory: ``recompute_student``, ``grad_checkpointing``, or
            empty for none.
    """

    student: str
    size: int
    batch: int
    branches: int = 1
    branch_width: float = 1.0
    ratio: float = 2.0
    precision: str = "32"
    channels_last: bool = False
    compile: bool = False
    saving: str = ""


def cases(device: str) -> list[Case]:
    """The rows of the table for a device, with networks and batches that take about a second.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    branches = ((1, 1.0), (6, 1.0), (6, 0.25))
    if device == "cpu":
        rows = [
            Case(student, size, batch, m, width)
            for student, size, batch in (
                ("resnet18", 64, 16),
                ("resnet18", 224, 8),
                ("mobilenetv1_relu", 224, 8),
                ("vit_tiny_patch16_224", 224, 8),
            )
            for m, width in (branches if "vit" not in student else branches[:1])
        ]
        return [*rows, *(Case("vit_tiny_patch16_224", 224, 8, saving=option) for option in SAVING)]
    gpu = partial(Case, size=224, batch=256, precision="bf16", channels_last=True)
    rows = [
        gpu(student, branches=m, branch_width=width, compile=compiled)
        for student in ("resnet18", "mobilenetv1_relu", "vit_tiny_patch16_224")
        for compiled in (False, True)
        for m, width in (branches if "vit" not in student else branches[:1])
    ]
    saving = [
        gpu(student, saving=o) for student in ("resnet18", "vit_tiny_patch16_224") for o in SAVING
    ]
    return [*rows, *saving]
