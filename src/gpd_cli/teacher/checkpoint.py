"""Write and read checkpoints: weights, architecture and width plan.

`fit` writes a Lightning checkpoint with a ``gpd`` entry; `expand` writes a safetensors file with
the same entry as JSON in the file's metadata. Either file suffices to rebuild the pair, as
`extract` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpd_cli.data.image_spec import ImageSpec
from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files import check_whole, save_tensors
from gpd_cli.forms import Form, FormError, anything, check_form, maybe, shown
from gpd_cli.models import with_versions
from gpd_cli.run_folder import BEST, CHECKPOINTS
from gpd_cli.teacher.checkpoint_checks import (
    bounded_by,
    check_description,
    check_images,
    check_options,
    check_tensors,
    check_values,
    damaged,
)
from gpd_cli.teacher.description import FORMAT, Description
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair

TRAINED = "current_model_state"
"""Checkpoint key of the trained weights, where ``state_dict`` has their average (EMA) instead."""
_PREFIX = "network."

Weights = Literal["ema", "raw"]


def save_expanded(path: Path, pair: Pair, description: Description) -> None:
    """Write an expanded student as safetensors, atomically.

    Args:
        path: path of the file, which ends in ``.safetensors``.
        pair: student and dynamic teacher.
        description: description of the pair.
    """
    save_tensors(path, pair.state_dict(), {"gpd": json.dumps(description.to_dict())})


def load_networks(path: str | Path, weights: Weights = "ema") -> tuple[Pair | Alone, Description]:
    """Rebuild the networks of a checkpoint of `fit` or a file of `expand`, in eval mode.

    Args:
        path: path of the file.
        weights: ``ema`` for the averaged weights where the run kept an average, or ``raw`` for the
            trained weights.

    Returns:
        The networks with their weights, and their description.

    Raises:
        WeightsError: when the file is missing, damaged, or was not written by gpd.
    """
    network, description, _ = load_chosen(path, weights)
    return network, description


def load_chosen(
    path: str | Path, weights: Weights = "ema"
) -> tuple[Pair | Alone, Description, str | None]:
    """Rebuild the networks as `load_networks` does, and say which weights were taken.

    Args:
        path: path of the file.
        weights: ``ema`` or ``raw``, see `load_networks`.

    Returns:
        The networks with their weights, their description, and a word for the kind of weights, or
        None where the file has only one kind.

    Raises:
        WeightsError: when the file is missing, damaged, or was not written by gpd.
    """
    path = Path(path)
    taken = None
    if not path.is_file():
        raise _missing(path, "fit or expand")
    if path.suffix == ".safetensors":
        entry, state = _read_expanded(path)
    else:
        entry, state, taken = _read_run(path, weights)
    network, description = _built(path, entry, state)
    try:
        network.load_state_dict(with_versions(state, network))
    except Exception as error:  # modules may load their state by code of their own
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise WeightsError(
            f"The weights in {path} do not fit {description.spec.name} as it is built here "
            f"({reason}); install the version of timm or torchvision that the run was trained with."
        ) from error
    return network.eval(), description, taken


def _built(path: Path, entry: Any, state: Mapping[str, Tensor]) -> tuple[Pair | Alone, Description]:
    """Build the networks of a file, with weights still to be loaded.

    Args:
        path: path of the file, for error messages.
        entry: the ``gpd`` entry of the file.
        state: the tensors of the file, by name.

    Returns:
        The networks, and their description.
    """
    _check_format(path, entry)
    try:
        check_tensors(state)
        check_description(entry, state)
        description = Description.from_dict(entry)
        with bounded_by(state):
            network = description.build()
        check_values(network, state)
    except GpdError:
        raise
    except Exception as error:  # networks are built by the code of others
        raise damaged(path, error) from error
    return network, description


def read_run(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `fit` without running code that it may hold, and check its content.

    Args:
        path: path of the checkpoint.

    Returns:
        The content of the checkpoint.

    Raises:
        WeightsError: when the file is missing, damaged, or no checkpoint of `fit`.
    """
    path = Path(path)
    if not path.is_file():
        raise _missing(path, "fit")
    check_whole(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise WeightsError(
            f"{path} cannot be read as a checkpoint of gpd fit, since it is damaged or another "
            "kind of file; give best.ckpt or last.ckpt of a run."
        ) from error
    if not isinstance(content, dict):
        content = {}
    check_content(path, content)
    return content


def _missing(path: Path, writers: str) -> WeightsError:
    """Make the error for a path that is no file; if it is a run's folder, name the checkpoint."""
    for inside in (path / CHECKPOINTS / BEST, path / BEST):
        if inside.is_file():
            return WeightsError(f"{path} is a folder; give a checkpoint in it, such as {inside}.")
    return WeightsError(f"There is no checkpoint {path}; give a file that {writers} wrote.")


_ANY: Form = {str: anything}
_PLAN: Form = {"ratio": float}
_CONTENT: Form = {
    "state_dict": {},
    "gpd": {"student": {}, "plan": maybe(_PLAN)},
    "pytorch-lightning_version": str,
    "hyper_parameters": {"student": str, **_ANY},
}
_OPTIONAL: Form = {
    "datamodule_hyper_parameters": _ANY,
    "class_names": maybe([str]),
    "global_step": int,
    "epoch": int,
    "settings": _ANY,
    TRAINED: {},
    "averaging_state": {"n_averaged": Tensor},
}


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the parts that `fit` writes.

    Args:
        path: path of the checkpoint, for error messages.
        content: content of the checkpoint, as it was read.

    Raises:
        WeightsError: when this is no checkpoint of `fit`, or a part is missing or has a wrong type.
    """
    if "gpd" not in content or "state_dict" not in content:
        raise WeightsError(
            f"{path} is not a checkpoint of gpd fit; give best.ckpt or last.ckpt of a run, or a "
            "file that gpd expand wrote."
        )
    try:
        _check_format(path, content["gpd"])
        check_form(content, _CONTENT, "the checkpoint")
        known = {name: form for name, form in _OPTIONAL.items() if name in content}
        if TRAINED in content:
            known["averaging_state"] = _OPTIONAL["averaging_state"]
        check_form(content, known, "the checkpoint")
        for name in known.keys() & {TRAINED} | {"state_dict"}:
            check_tensors(content[name])
        check_options(content["gpd"])
        if content["gpd"].get("images") is not None:
            check_images(content["gpd"]["images"])
    except FormError as error:
        raise damaged(path, error) from error


def _check_format(path: Path, entry: Any) -> None:
    found = entry.get("format") if isinstance(entry, Mapping) else None
    if found != FORMAT:
        raise WeightsError(
            f"{path} has the format {shown(found)}, but this version of gpd reads the format "
            f"{FORMAT}; use the version that wrote it."
        )


def exported_state(
    content: Mapping[str, Any], weights: Weights = "ema"
) -> tuple[dict[str, Tensor], str | None]:
    """Choose the weights of a checkpoint of `fit` that are exported.

    Args:
        content: content of the checkpoint.
        weights: ``ema`` for the averaged weights where an average had begun, or ``raw`` for the
            trained weights.

    Returns:
        The tensors by name, and a word for the kind of weights, or None where the checkpoint has
        only one kind.
    """
    if TRAINED not in content:
        return content["state_dict"], None
    if not int(content["averaging_state"]["n_averaged"]):
        return content[TRAINED], "raw, since the average had not begun"
    if weights == "raw":
        return content[TRAINED], "raw"
    return content["state_dict"], "averaged"


def _read_run(path: Path, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    content = read_run(path)
    state, taken = exported_state(content, weights)
    state = {k[len(_PREFIX) :]: v for k, v in state.items() if k.startswith(_PREFIX)}
    entry = content["gpd"]
    if isinstance(entry, Mapping) and (images := image_spec(content)) is not None:
        entry = {**entry, "images": images.to_dict()}
    return entry, state, taken


def image_spec(content: Mapping[str, Any]) -> ImageSpec | None:
    """Classes and preprocessing of the images that a checkpoint was trained on.

    If the classes have no names, their number is taken from the network. Earlier versions wrote no
    ``images`` entry; for their checkpoints, the result is derived from the settings of the data.

    Args:
        content: content of a checkpoint of `fit`.

    Returns:
        Classes and preprocessing, or None where the checkpoint does not tell them.
    """
    spec, classes = _stored_spec(content), content["gpd"]["student"].get("num_classes")
    if spec is None or spec.class_names is not None or not isinstance(classes, int):
        return spec
    return replace(spec, classes=classes)


def _stored_spec(content: Mapping[str, Any]) -> ImageSpec | None:
    found = content["gpd"].get("images")
    if found is not None:
        return ImageSpec.from_dict(found)
    names, settings = content.get("class_names"), content.get("datamodule_hyper_parameters", {})
    if names is None:
        return None
    if settings.get("_class_path") != "gpd_cli.data.ImageData":
        return ImageSpec(class_names=tuple(names))
    # Where the setting `classes` gives the number of classes, the data set has no class names.
    return ImageSpec.of_settings(settings, names if settings.get("classes") is None else None)


def _read_expanded(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    check_whole(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "gpd" not in metadata:
                raise WeightsError(
                    f"{path} was not written by gpd expand; give a file that gpd expand wrote, or "
                    "a checkpoint of gpd fit."
                )
            entry = json.loads(metadata["gpd"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} cannot be read ({_first_line(error)}); copy it again, or give another file."
        ) from error
    return entry, state


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
