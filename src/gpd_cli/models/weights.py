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
"""What `load_state_dict` can read."""

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
)
"""Keys under which training scripts keep the state dict, the preferred ones first: averaged weights
before raw ones, for it is theirs whose accuracy such scripts report and publish."""

PREFIXES = ("module.", "model.", "_orig_mod.")
"""What wrappers (DDP, Lightning, ``torch.compile``) put before every key."""

_SHOWN = 3  # keys of each kind in a message
# torchvision's published DenseNets say 'denselayer1.norm.1' for what is 'denselayer1.norm1' now.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU, without ever running code from the file.

    The state dict may lie under one of the keys in `WRAPPERS`, the first one present, also nested;
    prefixes in `PREFIXES` go where every key carries them.

    Args:
        path: ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or ``.tar`` as ``torch.save`` writes them, or
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

    The model is changed only when everything fits. The one thing a file may lack is
    ``num_batches_tracked`` of batch norms, which files older than that counter do.

    Args:
        model: takes the weights, in place.
        path: as for `load_state_dict`.
        name: what error messages call the model; by default its class.
        ignore: beginnings of keys that the model leaves out by design, such as auxiliary heads.

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
    # Versions are per module: all but the root's are left out, which makes modules accept the names
    # of their older versions and batch norms do without their counter.
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
    """What keeps a state dict from being loaded, tried out on a copy of the model."""
    misshaped = {
        key: f"{key} {_size(tensor)} instead of {_size(own[key])}"
        for key, tensor in tensors.items()
        # Scalars were once stored as vectors of one, which torch accepts.
        if key in own
        and tensor.shape != own[key].shape
        and (tensor.numel(), own[key].ndim) != (1, 0)
    }
    fitting = tensors.copy()
    for key in misshaped:
        del fitting[key]
    fitting._metadata = tensors._metadata  # type: ignore[attr-defined]
    try:
        # Modules may rename keys as they load: only loading tells which ones are missing.
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
    """Whatever a weight file holds."""
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
        path.open("rb").close()  # tells a file that may not be read from a damaged one
    except OSError as error:
        raise WeightsError(
            f"Cannot read '{path}': {error.strerror}; check the path and its permissions."
        ) from error
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        # timm's training script saves its arguments; a Namespace does nothing but hold them.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise almost anything
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
    """Take off what wrappers put before every key; stops where keys are among those to keep."""
    # The counter of torch's AveragedModel is the one key that its 'module.' does not precede.
    rest = {key: tensor for key, tensor in tensors.items() if key != "n_averaged"}
    while rest and not any(key in keep for key in rest):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in rest)), None)
        if prefix is None:
            break
        rest = tensors = {key.removeprefix(prefix): tensor for key, tensor in rest.items()}
    return tensors
