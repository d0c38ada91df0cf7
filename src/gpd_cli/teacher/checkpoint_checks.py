"""Checks of a checkpoint's content, before and after networks are built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpd_cli.branches.names import EXTRA_BRANCHES, MAIN_GATE
from gpd_cli.errors import WeightsError, reason_of
from gpd_cli.forms import FormError, check_form, maybe, plain, within
from gpd_cli.models.numbers import unusual_tensor, wrong_numbers
from gpd_cli.widening.plan_check import check_plan_values
from gpd_cli.widening.tensors import Storage

_MOST = 2**31
_SIDE = 2**15  # the most pixels along a side of an image
_FREE = 2**28  # how many elements a network may have in addition to the tensors of its file
_TEACHER, _ORIGINAL = "teacher.", ".parametrizations."
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}

_IMAGES = {
    "class_names": maybe([str]),
    "size": maybe([within(1, _SIDE)]),
    "channels": maybe(within(1, _SIDE)),
    "mean": maybe([float]),
    "std": maybe([float]),
    "crop_pct": maybe(float),
    "interpolation": maybe(str),
    "dataset": maybe(str),
    "root": maybe(str),
    "classes": maybe(within(1, _MOST)),
    "draw": maybe(str),
}
_DESCRIPTION = {
    "student": {"name": str, "num_classes": maybe(within(1, _MOST)), "model_args": {str: plain}},
    "plan": maybe({}),
    "branches": [{*EXTRA_BRANCHES, MAIN_GATE}],
    "storage": set(get_args(Storage)),
    "shape": [within(1, _SIDE)],
}


def check_description(entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Check the description of a checkpoint against its form and its tensors.

    Args:
        entry: the ``gpd`` entry, as it was read.
        state: the tensors of the same file, by name.

    Raises:
        FormError: when a part is missing, or has a wrong type or an impossible size.
    """
    check_form(entry, _DESCRIPTION, "the description")
    check_options(entry)
    if len(entry["shape"]) != 3 or math.prod(entry["shape"]) > _FREE:
        raise FormError(f"the description, shape is {entry['shape']}")
    if len(set(entry["branches"])) < len(entry["branches"]):
        raise FormError("the description names a branch twice")
    if (images := entry.get("images")) is not None:
        check_images(images)
    if entry["plan"] is not None:
        check_plan_values(entry["plan"], _shapes_by_name(state))


def check_options(entry: Mapping[str, Any]) -> None:
    """Check the parts of a description that may be missing, as in files of earlier versions.

    Args:
        entry: the ``gpd`` entry, as it was read.

    Raises:
        FormError: when one of the parts has a wrong type.
    """
    check_form(entry.get("branch_layers", []), [str], "the description, branch_layers")
    for name in ("shared", "shared_norms"):
        check_form(entry.get(name, True), bool, f"the description, {name}")
    width = entry.get("branch_width", 1.0)
    check_form(width, float, "the description, branch_width")
    if width <= 0:
        raise FormError(f"the description, branch_width is {width} and not above 0")


def check_images(images: Any) -> None:
    """Check the description of the images, of which any part may be missing.

    Args:
        images: the ``images`` part of the ``gpd`` entry, as it was read.

    Raises:
        FormError: when a part has a wrong type.
    """
    check_form(images, {}, "the description, images")
    known = {name: form for name, form in _IMAGES.items() if name in images}
    check_form(images, known, "the description, images")


def check_tensors(state: Any) -> None:
    """Check that a state dict holds tensors of numbers.

    Args:
        state: the state dict, as it was read.

    Raises:
        FormError: when it does not.
    """
    check_form(state, {str: Tensor}, "the weights")
    if (unusual := unusual_tensor(state)) is not None:
        name, kind = unusual
        raise FormError(f"the weights, {name} is a tensor of {kind}")


@contextmanager
def bounded_by(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Limit the size of the tensors that are made within this context.

    A damaged description may ask for a far larger network than the one whose weights the file
    holds; this stops it before it takes the memory.

    Args:
        state: the tensors of the file, by name.

    Raises:
        FormError: within the context, before a tensor is made that exceeds the limit.
    """
    most = 4 * sum(tensor.numel() for tensor in state.values()) + _FREE
    with _Bounded(most):
        yield


class _Bounded(TorchFunctionMode):
    """Count the elements of new tensors, and refuse to make more of them than a limit.

    Args:
        most: the most elements of all new tensors together.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _MAKERS:
            sizes = args[0] if args and isinstance(args[0], list | tuple) else args
            if all(isinstance(size, int) for size in sizes):
                self._left -= math.prod(max(size, 1) for size in sizes)
        if self._left < 0:
            raise FormError("the description is of a much larger network than the weights")
        return func(*args, **(kwargs or {}))


def check_values(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that the numbers in a file are possible for its network.

    Args:
        network: the network that was built from the description of the file.
        state: the tensors of the file, by their names in the network.

    Raises:
        FormError: when a tensor has impossible numbers, see
            `gpd_cli.models.numbers.wrong_numbers`.
    """
    if (wrong := wrong_numbers(network, state)) is not None:
        raise FormError(f"the weights, {wrong}")


def damaged(path: Any, error: Exception) -> WeightsError:
    """Make the error for a file that can be read, but whose content cannot be right.

    Args:
        path: path of the file.
        error: the error that its content led to.
    """
    reason = reason_of(error)
    if not isinstance(error, FormError):
        reason = f"{type(error).__name__}: {reason}"
    return WeightsError(
        f"The content of {path} cannot be used ({reason}); give another checkpoint of the run, or "
        "write the file again."
    )


def _shapes_by_name(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shapes of the dynamic teacher's tensors, by the names of the student's tensors."""
    found: dict[str, list[int]] = {}
    for key, tensor in state.items():
        if not key.startswith(_TEACHER):
            continue
        name = key.removeprefix(_TEACHER)
        owner, parametrized, leaf = name.partition(_ORIGINAL)
        if parametrized and leaf.endswith(".original"):
            name = f"{owner}.{leaf.removesuffix('.original')}"
        elif parametrized:
            continue
        found[name] = list(tensor.shape)
    return found
