"""Read weight files of timm, torchvision and plain training scripts; load them into networks."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpd_cli.errors import WeightsError
from gpd_cli.files import check_whole
from gpd_cli.models.fitting import fit_tensors
from gpd_cli.models.numbers import unusual_tensor, wrong_numbers
from gpd_cli.models.reused import ReusedClassifier
from gpd_cli.models.tensor_forms import listed, unprefixed

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
"""Keys under which training scripts save the state dict, in order of preference.

Averaged weights come before raw weights, since such scripts report and publish the accuracy of the
averaged weights.
"""


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU, without ever running code from the file.

    The state dict may be the file's whole content, or an entry under a key of `WRAPPERS`, even a
    nested one. Prefixes (`gpd_cli.models.tensor_forms.PREFIXES`) that every key has are removed.

    Args:
        path: path of a file written by ``torch.save`` (``.pth``, ``.pt``, ``.bin``, ``.ckpt`` or
            ``.tar``), or of a ``.safetensors`` file.

    Returns:
        Tensors by name.

    Raises:
        WeightsError: when the file is missing, unreadable or of another kind, holds Python objects
            other than tensors, or has no state dict.
    """
    return unprefixed(_unwrapped(_read(Path(path)), path))


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    ignore: Collection[str] = (),
    new_classifier: bool = False,
    prefer: str = "student.",
    hint: str = "",
    finite: bool = True,
) -> tuple[str, ...]:
    """Load a weight file into a model, as timm loads pretrained weights.

    The model is changed only if everything fits. Some differences are bridged (see
    `gpd_cli.models.fitting`): names of older versions and of other authors, image size, input
    channels, index buffers, a prefix, weights of losses, and on request the number of classes.

    Args:
        model: the model to load into, which is changed in place.
        path: path of a file with a state dict, in a format that `load_state_dict` reads.
        name: name of the model in error messages; by default its class.
        ignore: beginnings of keys that the model leaves out by design, such as auxiliary heads.
        new_classifier: whether the model keeps its own classifier if the file has none, or one of
            another number of classes.
        prefer: for a file with several networks that fit, the end of the prefix of the one to take.
        hint: remedy for the case that nothing but the number of classes differs, with
            ``{classes}`` for the number of classes in the file.
        finite: whether values that are NaN or infinite, and negative variances, are refused.

    Returns:
        Sentences on what was not loaded exactly as it is in the file.

    Raises:
        WeightsError: when the file cannot be read or does not fit the model.
    """
    read = _unwrapped(_read(Path(path)), path)
    return load_tensors(
        model,
        read,
        f"'{path}'",
        name=name,
        ignore=ignore,
        new_classifier=new_classifier,
        prefer=prefer,
        hint=hint,
        finite=finite,
    )


def load_tensors(
    model: nn.Module,
    read: Mapping[str, Tensor],
    source: str,
    *,
    name: str | None = None,
    ignore: Collection[str] = (),
    new_classifier: bool = False,
    prefer: str = "student.",
    hint: str = "",
    finite: bool = True,
) -> tuple[str, ...]:
    """Load a state dict into a model, as `load_weights` loads a file.

    If the model is a `ReusedClassifier` and the state dict is that of its body alone, the body gets
    the weights, all but those of the classifier that has been replaced.

    Args:
        model: the model to load into, which is changed in place.
        read: the state dict.
        source: name of the state dict in error messages.
        name: name of the model in error messages; by default its class.
        ignore: beginnings of keys that the model leaves out by design, such as auxiliary heads.
        new_classifier: whether the model keeps its own classifier if the state dict has none, or
            one of another number of classes.
        prefer: for a state dict with several networks that fit, the end of the prefix of the one to
            take.
        hint: remedy for the case that nothing but the number of classes differs, with
            ``{classes}`` for the number of classes in the state dict.
        finite: whether values that are NaN or infinite, and negative variances, are refused.

    Returns:
        Sentences on what was not loaded exactly as it is in the state dict.

    Raises:
        WeightsError: when the state dict does not fit the model.
    """
    if isinstance(model, ReusedClassifier) and not any(".projector." in f".{n}" for n in read):
        ignore = (*ignore, f"{model.replaced}.")
        model, read = model.body, unprefixed(read)
    if (unusual := unusual_tensor(read)) is not None:
        key, kind = unusual
        raise WeightsError(f"{source} cannot be used: {key} is of {kind}; give another file.")
    fitted = fit_tensors(model, read, ignore=ignore, new_classifier=new_classifier, prefer=prefer)
    if fitted.misfits:
        remedy = (
            "is it for another architecture or class count, or from a network with other "
            "constructor arguments (--model.student_args, --model.static_teacher.args, args in "
            "--model.assistants)?"
        )
        if fitted.remedy:
            remedy = f"{fitted.remedy}."
        elif fitted.classes and hint:
            remedy = hint.format(classes=fitted.classes)
        raise WeightsError(
            f"{source} does not fit {name or type(model).__name__}: {'; '.join(fitted.misfits)}; "
            f"{remedy}"
        )
    if (wrong := wrong_numbers(model, fitted.tensors, finite=finite)) is not None:
        raise WeightsError(f"{source} cannot be used: {wrong}; give another file.")
    model.load_state_dict(fitted.tensors)
    return fitted.notes


def _read(path: Path) -> Any:
    """Read the content of a weight file.

    Raises:
        WeightsError: when the file cannot be read; the message gives the cause and the remedy.
    """
    try:
        if path.is_dir():
            raise WeightsError(f"'{path}' is a folder; name the weight file in it.")
        if not path.exists():
            raise WeightsError(f"There is no weight file '{path}'; check the path.")
        if path.suffix.lower() not in WEIGHT_SUFFIXES:
            raise WeightsError(
                f"Cannot read '{path}': its suffix must be one of {', '.join(WEIGHT_SUFFIXES)}."
            )
        path.open("rb").close()  # an error here means missing permission, not a damaged file
    except OSError as error:
        raise WeightsError(
            f"Cannot read '{path}': {error.strerror}; check the path and its permissions."
        ) from error
    try:
        if path.suffix.lower() == ".safetensors":
            content: Any = load_file(path)
        else:
            # timm's training script saves its arguments as a Namespace, which runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for damaged files
        raise WeightsError(_why_unreadable(path, error)) from error
    check_whole(path)
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))  # torch's word for a class or function
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"'{path}' contains a Python object ({refused[1]}), and reading it could run code; "
            "save the state dict alone, with torch.save(model.state_dict(), path)."
        )
    if "TorchScript" in str(error):
        return (
            f"'{path}' is a TorchScript archive; save the state dict alone, with "
            "torch.save(model.state_dict(), path)."
        )
    return f"'{path}' is damaged or not a weight file; download or copy it again."


def _unwrapped(content: Any, path: str | Path) -> dict[str, Tensor]:
    """Find the state dict in the content of a weight file.

    Raises:
        WeightsError: when there is none, or the file is a checkpoint of `fit`.
    """
    if isinstance(content, Mapping) and "gpd" in content and "state_dict" in content:
        raise WeightsError(
            f"'{path}' is a checkpoint of gpd fit, which is no file of weights; extract "
            f"the student first (gpd extract --ckpt_path {path} --output student.pth) and give its "
            "file."
        )
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
        found = listed("entries such as", others)
    raise WeightsError(
        f"There is no state dict in '{path}', which contains {found}; save one with "
        "torch.save(model.state_dict(), path)."
    )
