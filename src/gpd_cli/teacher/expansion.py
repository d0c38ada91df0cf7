"""The library's entry point: grow a dynamic teacher out of any module."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gpd_cli.branches import MAIN_GATE, BranchInit, branch_names
from gpd_cli.errors import ExpansionError
from gpd_cli.generators import states_kept
from gpd_cli.teacher.build import build_pair, check_plan
from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.certification import InexactError, certify
from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.running.converting import converted
from gpd_cli.widening.running.copying import copy_network
from gpd_cli.widening.running.refresh import refresh
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.search.unsupported import check_student
from gpd_cli.widening.tensors import Storage

DEFAULT_NOISE = 1.0
"""Size of the symmetry-breaking noise, in units of each weight's own standard deviation."""


@states_kept()  # Python's and NumPy's; torch's state is restored where networks run
@torch.inference_mode(False)  # since the weights of the pair are to be trained
def expand(
    student: nn.Module,
    *,
    sample: Tensor,
    ratio: float = 2.0,
    branches: int | str | Sequence[str] = 1,
    noise: float = DEFAULT_NOISE,
    without_noise: Collection[str] = (),
    storage: Storage = "mixed",
    exclude: str | Sequence[str] = (),
    width_multiple: int = 1,
    branch_layers: str | Sequence[str] = "all",
    branch_init: BranchInit = "zero",
    branch_width: float = 1.0,
    plan: WidthPlan | None = None,
    certificate: Certificate | None = None,
    generator: torch.Generator | None = None,
) -> Pair:
    """Grow a dynamic teacher that computes exactly the student's function.

    This is the inverse reparameterization of Guo et al. (2025), section 3.3, with two differences:
    the wide activations are copies that are not rescaled, and the noise on the weights cancels. So
    any layer between two weights stays exact.

    Args:
        student: the network to expand, which is left untouched.
        sample: a batch of images, ``[B, C, H, W]``; only the shape matters.
        ratio: how many times as wide the teacher is, 1 or more.
        branches: how many of the paper's six branches a layer gets, the main kernel included (1 is
            the main kernel alone); or names of branches or of published sets (``dbb``). Each layer
            takes those that it can.
        noise: size of the zero-sum noise that lets the copies of a channel diverge, in units of
            each weight's standard deviation. The noise changes no output.
        without_noise: names of layers that get no noise, so that their weights are equal for all
            copies of an input channel. This is for layers that stay frozen, and whose output is to
            depend on the mean of these copies.
        storage: the scale at which shared weights are stored: ``mixed`` for SGD, ``student`` for
            Adam and similar optimizers, ``teacher`` for the steps that the paper's authors took.
        exclude: patterns of names (``layer4.*``) of layers that keep their output channels.
        width_multiple: the teacher's numbers of channels are rounded up to a multiple of this
            (8 suits tensor cores).
        branch_layers: which layers get branches: ``all`` that can take them, ``3x3_stride1`` as in
            the paper, or patterns of layer names.
        branch_init: initial values of the branches' gates: ``zero``, or ``orepa`` for the values of
            OREPA, to train from scratch. With ``gpd`` the values of the paper's authors are taken:
            student and teacher then both start as the function of the merged branches, which
            differs from the given student's function.
        branch_width: number of inner channels of the ``1x1_kxk`` branch, relative to the paper's.
            Merging this branch is by far the most expensive; 1/4 takes a quarter of the operations.
        plan: a width plan found before, which decides instead of `ratio`, `exclude` and
            `width_multiple`; by default a plan is found by running the student.
        certificate: certificate of the same expansion by this plan, made elsewhere; by default both
            networks are run and compared.
        generator: random generator of the noise and of the branches' initial weights; by default
            one with a fixed seed. The global random state is left alone.

    Returns:
        Student and dynamic teacher as one module, certified equal to 1e-9 in float64 (see
        `Pair.certificate`).

    Raises:
        ExpansionError: when the student does not run on the sample or cannot be expanded exactly;
            the message names the module and the remedy.
    """
    dtype, device = _checked_type(student)
    is_batch = isinstance(sample, Tensor) and sample.ndim >= 2 and sample.is_floating_point()
    if not is_batch or 0 in sample.shape:
        raise ExpansionError(
            "The sample must be a floating-point batch of images, [B, C, H, W], not "
            f"{_describe(sample)}."
        )
    if not isinstance(noise, int | float) or not 0 <= noise < float("inf"):
        raise ExpansionError(f"The noise must be 0 or more, not {noise}.")
    without_noise = _layers(without_noise, student)
    if storage not in get_args(Storage):
        raise ExpansionError(f"The storage must be one of {get_args(Storage)}, not {storage!r}.")
    if branch_init not in get_args(BranchInit):
        raise ExpansionError(
            f"The branch_init must be one of {get_args(BranchInit)}, not {branch_init!r}."
        )
    if not isinstance(branch_width, int | float) or not 0 < branch_width < float("inf"):
        raise ExpansionError(f"The branch_width must be above 0, not {branch_width}.")
    if not isinstance(plan, WidthPlan | None):
        raise ExpansionError(f"The plan must be a WidthPlan, not {_describe(plan)}.")
    if certificate is not None and plan is None:
        raise ExpansionError("A certificate is valid for one plan only; give the plan as well.")
    names = branch_names(branches, branch_init)
    if branch_width != 1 and MAIN_GATE in names:
        raise ExpansionError(
            "The branch_width of the authors' block (branches gpd) must be 1; leave out "
            "branch_width."
        )
    patterns = _patterns(exclude, "What to exclude")
    layers = _patterns(branch_layers, "The branch_layers")
    generator = generator or torch.Generator().manual_seed(0)

    start = generator.get_state()

    def grow(plan: WidthPlan, noise: float = noise) -> Pair:
        # A second call starts from the same state: the weights depend on seed and plan alone.
        generator.set_state(start)
        try:
            return _grow(
                student,
                plan,
                sample,
                certificate,
                branches=names,
                branch_layers=layers,
                noise=noise,
                without_noise=without_noise,
                storage=storage,
                branch_init=branch_init,
                branch_width=branch_width,
                generator=generator,
            )
        except InexactError as error:
            if not noise or not is_exact_without_noise(plan):
                raise
            raise InexactError(
                f"{str(error).removesuffix('.')}, except with noise 0, probably since the output "
                "of one of its layers is no linear function of the layer's weight; set the noise "
                "to 0 (--model.noise 0), or name the layer in without_noise."
            ) from error

    def is_exact_without_noise(plan: WidthPlan) -> bool:
        with suppress(ExpansionError):
            grow(plan, 0.0)
            return True
        return False

    if plan is not None:
        check_plan(student, plan)
        return converted(grow(plan), device, dtype)
    options: dict[str, Any] = {"exclude": patterns, "width_multiple": width_multiple}
    plan = find_plan(student, sample, ratio, is_certified=True, **options)
    try:
        return converted(grow(plan), device, dtype)
    except ExpansionError:
        # The plan was found with smaller images, for which the network's code may take another
        # path, so it is searched again with images of the sample's size.
        again = find_plan(student, sample, ratio, shrink=False, **options)
        if again == plan:
            raise
        return converted(grow(again), device, dtype)


def _patterns(given: str | Sequence[str], what: str) -> Sequence[str]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise ExpansionError(
            f"{what} must be a pattern of layer names, or a list of them, not {given!r}."
        )
    return patterns


def _layers(given: Collection[str], student: nn.Module) -> Collection[str]:
    """Check the names of the layers that get no noise."""
    names = (given,) if isinstance(given, str) else given
    modules = {name for name, _ in student.named_modules()}
    if unknown := [name for name in names if name not in modules]:
        raise ExpansionError(
            f"{type(student).__name__} has no layer {unknown[0]!r}; without_noise takes the names "
            "of layers, as named_modules() gives them."
        )
    return names


def _grow(
    student: nn.Module,
    plan: WidthPlan,
    sample: Tensor,
    certificate: Certificate | None,
    **options: Any,
) -> Pair:
    refresh(student)
    network = student
    if options["branch_init"] != "zero":
        # With branches that are not zero, kernels are exact enough for the check in float64 only.
        network = converted(copy_network(student), "cpu", torch.float64)
    elif any(tensor.device.type != "cpu" for tensor in (*student.parameters(), *student.buffers())):
        network = copy_network(student).to("cpu")
    pair = build_pair(network, plan, **options)
    pair.certificate = certificate or certify(pair, sample)
    return pair


def _checked_type(student: nn.Module) -> tuple[torch.dtype, torch.device]:
    if not isinstance(student, nn.Module):
        raise ExpansionError(
            f"The student must be a module, not {_describe(student)}; timm.create_model and "
            "torchvision.models.get_model make a module from a name."
        )
    check_student(student)
    tensors = [*student.parameters(), *student.buffers()]
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating:
        raise ExpansionError(f"{type(student).__name__} has no weights to expand.")
    if any(t.is_meta for t in floating):
        raise ExpansionError(
            f"{type(student).__name__} has weights on the meta device; initialize them first."
        )
    dtypes = {t.dtype for t in floating}
    if len(dtypes) > 1:
        raise ExpansionError(
            f"{type(student).__name__} mixes the types {sorted(map(str, dtypes))}; convert it to "
            "one type first, for example with .float()."
        )
    return floating[0].dtype, floating[0].device


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return type(value).__name__
