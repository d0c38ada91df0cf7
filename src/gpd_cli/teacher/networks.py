"""The networks that are trained: a student with its dynamic teacher, or a student alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpd_cli.branches import BranchInit, branch_names, branched_layers
from gpd_cli.teacher.build import merged_networks
from gpd_cli.teacher.expansion import expand
from gpd_cli.teacher.found_once import grown_once
from gpd_cli.teacher.grad_checkpointing import FirstRunBuffers
from gpd_cli.teacher.layer_patterns import layer_patterns
from gpd_cli.teacher.pair import Pair
from gpd_cli.teacher.unshared import without_sharing
from gpd_cli.widening.running.copying import copy_network

_PROBE_BATCH = 2


class Alone(nn.Module):
    """A student without a dynamic teacher, for plain training, with the interface of `Pair`.

    Args:
        student: the network to train.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.network = student
        self.runs_again = False  # whether the backward pass runs parts of the student again

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """The student's logits, ``[B, C]``, and None in place of the dynamic teacher's logits."""
        if not (self.runs_again and torch.is_grad_enabled()):
            return self.network(images), None
        buffers = FirstRunBuffers(self)
        with buffers.recorded():
            logits = self.network(images)
        buffers.prepare_backward([logits])
        return logits, None

    def student(self, images: Tensor) -> Tensor:
        """The student's logits, ``[B, C]``."""
        return cast(Tensor, self.network(images))

    def extract(self) -> nn.Module:
        """A copy of the student."""
        return copy_network(self.network)

    def outline(self) -> nn.Module:
        """A copy of the student, see `Pair.outline`."""
        return self.extract()


def with_teacher(
    student: nn.Module,
    shape: tuple[int, int, int],
    *,
    ratio: float,
    branches: int | str | Sequence[str],
    exclude: str | Sequence[str] | None = None,
    branch_layers: str | Sequence[str] = "all",
    shared: bool = True,
    shared_norms: bool = True,
    **options: Any,
) -> Pair | Alone:
    """Grow a student's dynamic teacher, unless the two would be the same network.

    In a run of several processes the first one finds the width plan and certifies the expansion,
    see `grown_once`.

    Args:
        student: the network to train.
        shape: image shape, ``(C, H, W)``.
        ratio: how many times as wide the teacher is, 1 or more.
        branches: how many of the paper's six branches a layer gets, or names of branches or of
            published sets.
        exclude: patterns of names of layers that keep their output channels: one, several, or none.
        branch_layers: which layers get branches: ``all``, ``3x3_stride1``, or patterns of names.
        shared: whether both networks share their weights, see `gpd_cli.teacher.Unshared`.
        shared_norms: whether they share the weights of norms, too.
        options: further options of `gpd_cli.expand`.

    Returns:
        The pair, or the student as `Alone` at ratio 1 without branches.

    Raises:
        ExpansionError: when the student cannot be expanded exactly.
    """
    init = options.get("branch_init")
    if ratio == 1 and not _takes_branches(student, branches, branch_layers, init):
        return Alone(student)

    def grow(**found: Any) -> Pair:
        return expand(
            student,
            sample=torch.zeros(_PROBE_BATCH, *shape),
            ratio=ratio,
            branches=branches,
            exclude=layer_patterns(exclude),
            branch_layers=layer_patterns(branch_layers),
            **options,
            **found,
        )

    return without_sharing(grown_once(grow), shared, shared_norms)


def _takes_branches(
    student: nn.Module,
    branches: int | str | Sequence[str],
    layers: str | Sequence[str],
    init: BranchInit | None,
) -> bool:
    """Whether any layer of a student gets a branch besides its main kernel."""
    if branches == 1:
        return False
    names = branch_names(branches, init)
    return bool(branched_layers(student, names, layer_patterns(layers)))


def plain_networks(network: Pair | Alone) -> dict[str, nn.Module]:
    """Extract the networks in training as plain modules in eval mode.

    Args:
        network: the network that is trained.

    Returns:
        The networks by name: ``student``, and ``teacher`` where there is a dynamic teacher.
    """
    if isinstance(network, Alone):
        return {"student": network.extract().eval()}
    student, teacher = merged_networks(network)
    return {"student": student.eval(), "teacher": teacher.eval()}


def summary(name: str, network: Pair | Alone) -> str:
    """Describe the networks in training in a line, and add one for each module kept narrow inside.

    Args:
        name: the student's name.
        network: the network that is trained.
    """
    student = sum(p.numel() for p in network.outline().parameters())
    text = f"{name}: {student:,} parameters"
    if not isinstance(network, Pair) or (certificate := network.certificate) is None:
        return f"{text}, trained alone"
    trained = sum(p.numel() for p in network.parameters())
    as_wide = network.plan.ratio == 1
    teacher = "a dynamic teacher that is no wider" if as_wide else "its dynamic teacher"
    lines = [
        f"{text}; with {teacher} {trained:,}; their logits differ by "
        f"{certificate.difference:.0e} (relative, float64) at the start"
        f"{'' if certificate.in_training is not None else ', not compared in train mode'}"
    ]
    if as_wide:
        lines += [
            "With --model.ratio 1 the student still has branches; add --model.branches 1 to train "
            "the student alone."
        ]
    lines += [
        f"{module} stays narrow inside: {why}" for module, why in network.plan.kept_narrow.items()
    ]
    return "\n".join(lines)
