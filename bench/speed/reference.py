"""Timing of the joint step in the paper authors' own code, which is imported from a checkout.

The checkout (github.com/guoyongcs/GPD) is imported unchanged, in a process that does nothing else.
The step consists of the same parts as in the authors' training loop: forward pass of the wide
network, backward pass of its loss, forward pass of the student with both of the student's losses,
their backward pass, and the optimizer. In the authors' code, only 3 x 3 convolutions of stride 1
have branches.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import statistics
import sys
import types
import warnings
from pathlib import Path

import torch
from torch import nn

from bench.speed.case import Case
from bench.speed.measure import Step, make_steps, precision, take_turns
from gpd_cli.errors import GpdError
from gpd_cli.training.subnormals import flushed_subnormals

_FILES = ("gpd_utils.py", "orepa_ft.py", "models/resnet.py")


def has_reference(case: Case) -> bool:
    """Whether a case can be run with the authors' code: ResNet-18 with six branches, not compiled.

    Args:
        case: the case.
    """
    wanted = (case.student, case.branches, case.branch_width, case.compile)
    return wanted == ("resnet18", 6, 1.0, False)


def find_code(folder: Path) -> Path:
    """The folder, inside a checkout, with the code for convolutional networks.

    Args:
        folder: folder of the checkout.

    Raises:
        GpdError: when the folder is not a checkout of the authors' code.
    """
    code = folder / "CNN"
    missing = [name for name in _FILES if not (code / name).is_file()]
    if missing:
        raise GpdError(
            f"{folder} is no checkout of github.com/guoyongcs/GPD: it has no CNN/{missing[0]}; "
            "set --reference to the folder of one."
        )
    return code


@flushed_subnormals()
def measure_reference(case: Case, device: str, rounds: int, folder: Path) -> dict[str, float]:
    """Time the authors' joint step against plain steps of our networks.

    Args:
        case: the case, which satisfies `has_reference`.
        device: ``cpu`` or ``cuda``.
        rounds: number of turns that count.
        folder: folder of the checkout.

    Returns:
        Medians: ``joint``, the authors' joint step in milliseconds, and ``ratio``, the joint step
        over the floor of the same turn.

    Raises:
        GpdError: when the folder is not a checkout of the code, or the code does not run.
    """
    step = _step(case, device, find_code(folder))
    steps = {**make_steps(case, device, ("student", "wide")), "joint": step}
    try:
        times = take_turns(steps, device, rounds)
    except Exception as error:
        raise _unsuitable(folder, error) from error
    ratios = [
        joint / (student + wide)
        for student, wide, joint in zip(*(times[n] for n in steps), strict=True)
    ]
    return {
        "joint": 1000 * statistics.median(times["joint"]),
        "ratio": statistics.median(ratios),
    }


def _step(case: Case, device: str, code: Path) -> Step:
    sys.path.insert(0, str(code))
    if importlib.util.find_spec("einops") is None:
        # The code imports this package, but needs it only for networks that are not timed here.
        stand_in = types.ModuleType("einops")
        stand_in.rearrange = None  # type: ignore[attr-defined]
        sys.modules["einops"] = stand_in
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            theirs = importlib.import_module("gpd_utils")
            network = importlib.import_module("models").resnet18()
            network = importlib.import_module("orepa_ft").transfer2orepa(
                network, train_from_scratch=True
            )
            network = theirs.gpd_init(
                network,
                first_module_name_list=["conv1"],
                last_module_name_list=["fc"],
                test_input=[torch.rand(1, 3, 224, 224)],
                gpd_ratio=int(case.ratio),
            )
    except Exception as error:
        raise _unsuitable(code.parent, error) from error
    network = network.to(device).train()
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    if case.channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (case.batch,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        with precision(case.precision, device):
            wide = theirs.forward_expanded(network, images)
            loss = criterion(wide, labels)
            total, *_ = theirs.enhance_with_es(
                network,
                images,
                wide,
                loss,
                lambda logits: criterion(logits, labels),
                [],
                kd_loss_type="sce",
                kd_loss_weight=3,
            )
        total.backward()
        optimizer.step()

    return step


def _unsuitable(folder: Path, error: Exception) -> GpdError:
    reason = " ".join(str(error).split())[:300] or "no reason given"
    return GpdError(f"The code in {folder} does not run here: {type(error).__name__}: {reason}.")
