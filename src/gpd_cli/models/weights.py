"""Reading weight files of timm, torchvision and of plain training scripts."""

from __future__ import annotations

import argparse
import copy
import pickle
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpd_cli.errors import WeightsError

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
"""Suffixes of the files that `load_state_dict` can read."""

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
)
"""Keys under which training scripts save the state dict, in order of preference: averaged weights
before raw weights, since such scripts report and publish the accuracy of the averaged ones."""

PREFIXES = ("module.", "model.", "_orig_mod.")
"""Prefixes that wrappers (DDP, Lightning, ``torch.compile``) put before every key."""

_SHOWN = 3  # keys of each kind in a message
# torchvision's published DenseNets have 'denselayer1.norm.1' for today's 'denselayer1.norm1'.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU, without ever running code from the file.

    The state dict may be an entry of the file, also nested, under the first key of `WRAPPERS` that
    is present. Prefixes in `PREFIXES` are removed where every key has them.

    Args:
        path: ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or ``.tar`` as written by ``torch.save``, or
            ``.safetensors``.

    Returns:
        Tensors by name.

    Raises:
        WeightsError: when the file is missing, unreadable, of another kind, or holds Python objects
            or no state dict.
    """
    return _unprefixed(_unwrapped(_read(Path(path)), path))


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    ignore: Collection[str] = (),
) -> None:
    """Load a weight file strictly into a model.

    The model is changed only if all weights fit. A file may lack ``num_batches_tracked`` of batch
    norms only, as old files do.

    Args:
        model: the model, changed in place.
        path: the file, see `load_state_dict`.
        name: name of the model in error messages; by default its class.
        ignore: prefixes of keys that the model does not have by design, such as auxiliary heads.

    Raises:
        WeightsError: when the file cannot be read or does not fit the model.
    """
    own = model.state_dict()
    read = _unprefixed(_unwrapped(_read(Path(path)), path), keep=own)
    tensors = OrderedDict(
        (key if key in own else _OLD_DENSENET.sub(r"\1\2", key), tensor)
        for key, tensor in read.items()
        if not key.startswith(tuple(ignore))
    )
    # Versions are per module. Without them modules accept the names of older versions, and batch
    # norms do not need their counter; only the root's version is kept.
    versions = getattr(own, "_metadata", {})
    tensors._metadata = {"": versions.get("", {})}  # type: ignore[attr-defined]

    misfits = _misfits(model, tensors, own)
    if misfits:
        raise WeightsError(
            f"'{path}' does not fit {name or type(model).__name__}: {'; '.join(misfits)}; "
            "is it for another architecture or class count?"
        )
    model.load_state_dict(tensors)


def _misfits(
    model: nn.Module, tensors: OrderedDict[str, Tensor], own: Mapping[str, Tensor]
) -> list[str]:
    """Reasons why a state dict cannot be loaded, found by loading it into a copy of the model."""
    misshaped = {
        key: f"{key} {_size(tensor)} instead of {_size(own[key])}"
        for key, tensor in tensors.items()
        # Old files store scalars as vectors of one element, which torch accepts.
        if key in own
        and tensor.shape != own[key].shape
        and (tensor.numel(), own[key].ndim) != (1, 0)
    }
    fitting = tensors.copy()
    for key in misshaped:
        del fitting[key]
    fitting._metadata = tensors._metadata  # type: ignore[attr-defined]
    try:
        # Modules may rename keys while loading, so that only loading shows missing keys.
        result = copy.deepcopy(model).load_state_dict(fitting, strict=False)
    except (RuntimeError, AssertionError) as error:
        return [" ".join(str(error).split()).rstrip(".") or "its modules refuse it"]
    missing = [key for key in result.missing_keys if key not in misshaped]
    found = [
        _listed("missing", missing),
        _listed("unexpected", result.unexpected_keys),
        _listed("shaped", misshaped.values()),
    ]
    return [text for text in found if text]


def _listed(kind: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{kind} {', '.join(keys[:_SHOWN])}{more}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _read(path: Path) -> Any:
    """The content of a weight file."""
    try:
        if path.is_dir():
            raise WeightsError(f"'{path}' is a folder: name the weight file in it.")
        if not path.exists():
            raise WeightsError(f"There is no weight file '{path}': check the path.")
        if path.suffix.lower() not in WEIGHT_SUFFIXES:
            raise WeightsError(
                f"Cannot read '{path}': its suffix '{path.suffix}' is none of "
                f"{', '.join(WEIGHT_SUFFIXES)}."
            )
        path.open("rb").close()  # an error here means missing permission, not a damaged file
    except OSError as error:
        raise WeightsError(
            f"Cannot read '{path}': {error.strerror}; check the path and its permissions."
        ) from error
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        # timm's training script saves its arguments as a Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for damaged files
        raise WeightsError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))  # torch's word for a class or function
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"'{path}' holds a Python object ({refused[1]}), and reading it could run code: "
            "save the state dict alone, with torch.save(model.state_dict(), path)."
        )
    if "TorchScript" in str(error):
        return (
            f"'{path}' is a TorchScript archive: save the state dict alone, "
            "with torch.save(model.state_dict(), path)."
        )
    return f"'{path}' is damaged, or no weight file at all: download or copy it again."


def _unwrapped(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict in the content of a weight file."""
    while isinstance(content, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping):
        found = f"a {type(content).__name__}"
    elif not content:
        found = "nothing"
    elif all(isinstance(key, str) and isinstance(v, Tensor) for key, v in content.items()):
        return {key: tensor.detach() for key, tensor in content.items()}
    else:
        others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
        found = _listed("entries such as", others)
    raise WeightsError(
        f"There is no state dict in '{path}', which holds {found}: "
        "save one with torch.save(model.state_dict(), path)."
    )


def _unprefixed(tensors: dict[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers, until some key is among the keys to keep."""
    # torch's AveragedModel puts 'module.' before all keys but its counter.
    rest = {key: tensor for key, tensor in tensors.items() if key != "n_averaged"}
    while rest and not any(key in keep for key in rest):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in rest)), None)
        if prefix is None:
            break
        rest = tensors = {key.removeprefix(prefix): tensor for key, tensor in rest.items()}
    return tensors
