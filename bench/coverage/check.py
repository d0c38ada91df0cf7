"""The check of one network: expand it, compare, train a few steps, extract it, compare again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli import Pair, expand
from gpd_cli.errors import ExpansionError, ModelError
from gpd_cli.models import create_model
from gpd_cli.models.inputs import count_classes, input_shape
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.widening.running.double import in_double
from gpd_cli.widening.running.randomize import randomize

TOLERANCE = 1e-9
"""Largest relative difference of the logits, in float64, that counts as exact."""
HEADLESS_CLASSES = 10
"""Classes of a network that comes without a classifier."""
SMALL_SIZES = (128, 140, 160)
"""Image sizes in pixels that are tried first, since the algebra is the same and takes less time."""
USUAL_SIZES = (224, 252, 256)
"""Image sizes in pixels that are tried if small ones fail, unless the network's own is smaller."""
LARGE = 30_000_000
"""Number of parameters from which on a network is tried with fewer blocks (see `shortened`)."""
KEPT_BLOCKS = 2
"""Number of blocks kept of each run of equal blocks."""
BATCH = 2
"""Number of images in a batch."""


@dataclass(frozen=True)
class Settings:
    """How each network is tried.

    Args:
        ratio: the expansion ratio.
        branches: number of branches per kernel, counting the kernel itself.
        steps: number of optimizer steps between expansion and extraction.
    """

    ratio: float = 2
    branches: int = 3
    steps: int = 2


def check(
    name: str, report: Callable[[str], None], settings: Settings, threads: int | None = None
) -> dict[str, Any]:
    """Try one network, from building it to loading the extracted weights into a fresh one.

    Args:
        name: name of the network, see `gpd_cli.models.create_model`.
        report: function that is called with the name of each stage when the stage begins.
        settings: how to try the network.
        threads: number of torch's threads; by default torch's own choice.

    Returns:
        Plain values: ``outcome`` (``exact``, ``inexact``, or ``refused``), ``reason``, and the
        measurements (see `_measure`). Unexpected exceptions are bugs, and are not caught.
    """
    warnings.filterwarnings("ignore")
    if threads:
        torch.set_num_threads(threads)
    report("build")
    torch.manual_seed(0)
    try:
        classes, shapes, is_shortened = _classes_and_shapes(name)
    except ModelError as error:
        return {"outcome": "refused", "reason": str(error)}

    def tell(side: int, before: str, stage: str) -> None:
        report(f"{stage} at {side} px{before}")

    result: dict[str, Any] = {}
    # Text about the outcome with small images, which is reported with each stage, so that it is
    # known even if the larger images exceed a limit.
    before = ""
    for shape in shapes:
        side = shape[-1]
        result = {"size": shape, "classes": classes, "shortened": is_shortened}
        try:
            result |= _measure(name, classes, shape, settings, partial(tell, side, before))
        except ExpansionError as error:
            result |= {"outcome": "refused", "reason": str(error)}
        if result["outcome"] == "exact":
            break  # otherwise the result with the last shape is the one that counts
        before = f" ({result['outcome']} at {side} px: {result['reason']})"
    return result


def build(name: str, classes: int | None = None) -> nn.Module:
    """Build a network without randomness in its forward pass: no dropout, no stochastic depth.

    Args:
        name: name of the network, see `gpd_cli.models.create_model`.
        classes: number of classes; by default the network's own.
    """
    network = create_model(name, num_classes=classes)
    shortened(network)
    for module in network.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, float) and ("drop" in attribute or attribute in ("p", "prob")):
                setattr(module, attribute, 0.0)
    return network


def shortened(network: nn.Module) -> bool:
    """Remove equal blocks from a large network, in place, since equal blocks widen in the same way.

    Args:
        network: the network; one with fewer than `LARGE` parameters is not changed.

    Returns:
        Whether any blocks were left out.
    """
    changed = False
    if sum(p.numel() for p in network.parameters()) < LARGE:
        return changed
    for module in list(network.modules()):
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        kept: list[str] = []
        for key, child in list(module.named_children()):
            if kept.count(repr(child)) >= KEPT_BLOCKS:
                del module._modules[key]
                changed = True
            else:
                kept.append(repr(child))
        if isinstance(module, nn.ModuleList):
            module._modules = {str(k): v for k, v in enumerate(module._modules.values())}
    return changed


def _classes_and_shapes(name: str) -> tuple[int | None, list[tuple[int, int, int]], bool]:
    """Number of classes (None for the default), input shapes, and whether blocks are left out.

    The input shapes are a small one, if the network runs on small images, and then a usual one or
    the network's own.
    """
    network = build(name)
    is_shortened = shortened(create_model(name))
    classes = HEADLESS_CLASSES if getattr(network, "num_classes", None) == 0 else None
    if classes:
        network = build(name, classes)
    own = input_shape(network, name)
    count_classes(network, own)
    if (getattr(network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
        return classes, [own], is_shortened
    shapes = []
    for sides in (SMALL_SIZES, USUAL_SIZES):
        smaller = ((own[0], side, side) for side in sides if side < min(own[1:]))
        shapes += [next((shape for shape in smaller if _runs(network, shape)), own)]
    return classes, list(dict.fromkeys(shapes)), is_shortened


def _runs(network: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether a network takes images of a shape, in train mode and in eval mode."""
    try:
        with torch.no_grad():
            network.train()(torch.randn(BATCH, *shape))
            logits = network.eval()(torch.randn(BATCH, *shape))
    except Exception:  # networks raise many kinds of errors for images that are too small
        return False
    return bool(logits.isfinite().all())


def _measure(
    name: str,
    classes: int | None,
    shape: tuple[int, int, int],
    settings: Settings,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Try the network with one input shape.

    Returns:
        ``outcome`` and ``reason``; ``parameters`` of the student and ``wide_parameters`` of the
        merged teacher; ``eval_error`` and ``train_error``, relative differences of wide and narrow
        logits in float64; ``dtype``, the type of the optimizer steps; ``moved``, the fraction of
        the student's weights that the steps changed; ``extraction``, whether the extracted network
        equals the student bit for bit, also after a strict load into a fresh network.
    """
    report("expand")
    student = build(name, classes).double()
    randomize(student, torch.Generator().manual_seed(1))
    x = torch.randn(BATCH, *shape, dtype=torch.float64)
    pair = expand(student, sample=x, ratio=settings.ratio, branches=settings.branches)
    result: dict[str, Any] = {
        "narrow": dict(pair.plan.kept_narrow),
        "trials": pair.plan.trials,
        "parameters": sum(p.numel() for p in student.parameters()),
        "wide_parameters": _merged_parameters(pair),
    }
    report("compare")
    for mode in ("eval", "train"):
        result[f"{mode}_error"] = _error(pair, student, x, training=mode == "train")
    worst = max(result["eval_error"], result["train_error"])
    if not worst <= TOLERANCE:
        mode = "eval" if result["eval_error"] == worst else "train"
        return result | {"outcome": "inexact", "reason": f"logits are off by {worst:.1e} in {mode}"}

    report("train")
    student.float()
    x = x.float()
    _train(pair.float(), x, settings.steps)
    weights = next(pair.parameters())
    x = x.to(weights.dtype)
    report("extract")
    extracted = pair.eval().extract().eval()
    result["dtype"] = str(weights.dtype).removeprefix("torch.")
    result["moved"] = _moved(student, extracted)
    assert result["moved"] > 0.1 or not settings.steps, "the optimizer changed too few weights"
    del student
    with torch.no_grad():
        expected = pair.student(x)
        outputs = {"extracted": extracted(x)}
        del pair
        fresh = build(name, classes).to(weights.dtype)
        fresh.load_state_dict(extracted.state_dict(), strict=True)
        del extracted
        outputs["reloaded"] = fresh.eval()(x)
    off = {n: relative_difference(y, expected) for n, y in outputs.items()}
    unequal = [n for n, y in outputs.items() if not torch.equal(y, expected)]
    if not unequal:
        return result | {"extraction": True, "outcome": "exact", "reason": ""}
    reason = " and ".join(f"the {n} network is off by {off[n]:.1e}" for n in unequal)
    return result | {"extraction": False, "outcome": "inexact", "reason": reason}


def _error(pair: Pair, student: nn.Module, x: Tensor, training: bool) -> float:
    """The relative difference of a pair's logits from the original network's, the larger of both.

    Args:
        pair: student and dynamic teacher.
        student: the original network.
        x: images, ``[B, C, H, W]``.
        training: whether to compare in train mode.
    """
    pair.train(training)
    student.train(training)
    with torch.no_grad(), in_double():
        expected = student(x)
        narrow, wide = pair.student(x), pair.teacher(x)
        pair.forget()
    return max(relative_difference(narrow, expected), relative_difference(wide, expected))


def _merged_parameters(pair: Pair) -> int:
    """The number of parameters of the teacher after merging its branches."""
    return sum(
        parameter.numel()
        for name, parameter in pair.teacher.named_parameters()
        if "parametrizations." not in name or name.endswith(".original")
    )


def _train(pair: Pair, x: Tensor, steps: int) -> None:
    """Train a pair by plain SGD on the cross-entropy of both networks.

    With fully random weights, gradients may explode. So the norm of each gradient is limited to the
    norm of its weight, and training goes on in float64 if gradients overflow in float32. The labels
    are the least probable classes, for which the gradient of cross-entropy does not vanish.

    Args:
        pair: student and dynamic teacher, in float32; changed in place.
        x: images, ``[B, C, H, W]``.
        steps: number of optimizer steps.
    """
    optimizer = torch.optim.SGD(pair.train().parameters(), 1e-2)
    done = 0
    while done < steps:
        optimizer.zero_grad()
        narrow, wide = pair(x)
        labels = wide.detach().argmin(1)
        (F.cross_entropy(narrow, labels) + F.cross_entropy(wide, labels)).backward()
        del narrow, wide
        gradients = [(p, p.grad) for p in pair.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for _, gradient in gradients):
            assert x.dtype == torch.float32, "gradients are not finite in float64 either"
            optimizer.zero_grad()
            pair.double()
            x = x.double()
            continue
        for parameter, gradient in gradients:
            norm = gradient.norm()
            if norm > parameter.detach().norm():
                gradient.mul_(parameter.detach().norm() / norm)
        optimizer.step()
        done += 1
    optimizer.zero_grad()


def _moved(before: nn.Module, after: nn.Module) -> float:
    """The fraction of weights that differ between two networks of the same architecture.

    Weights are the elements of parameters with two axes or more.
    """
    changed = total = 0
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        if old.ndim > 1:
            changed += int((old.to(new.dtype) != new).sum())
            total += old.numel()
    return changed / max(1, total)
