"""Fit the tensors of a weight file to a network, as timm does for its pretrained networks.

Published files differ from the networks that are to load them. Some differences can be bridged:
another number of classes or input channels, another image size, older names, index buffers that are
no longer stored, a prefix, tensors of a loss. All others are misfits, which are reported.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from gpd_cli.models.end_layers import classifier_names, stem_names
from gpd_cli.models.inputs import input_shape, takes_images
from gpd_cli.models.tensor_forms import COUNTER, TensorForm, listed, possible_forms
from gpd_cli.models.versions import needed_versions

_RGB = 3
# Names of tables that follow from the architecture, which only older files store.
_INDEX_BUFFERS = (
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "attention_bias_idxs",
    "total_ops",
    "total_params",
)


@dataclass(frozen=True)
class Fitted:
    """The tensors of a file that were fitted to a network.

    Args:
        tensors: the state dict, which can be loaded if there are no misfits.
        notes: sentences on what is not exactly as in the file.
        misfits: sentences on what keeps the tensors from being loaded.
        classes: number of classes in the file, if only the classifier does not fit.
        remedy: what to do about the misfits, if that is known.
    """

    tensors: OrderedDict[str, Tensor]
    notes: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    classes: int | None = None
    remedy: str | None = None


def fit_tensors(
    model: nn.Module,
    read: Mapping[str, Tensor],
    *,
    ignore: Collection[str] = (),
    new_classifier: bool = False,
    prefer: str = "student.",
) -> Fitted:
    """Find the form of a file's tensors that fits a network.

    Args:
        model: the network, which is left unchanged.
        read: the tensors of the file, by name.
        ignore: beginnings of keys that the network leaves out by design, such as auxiliary heads.
        new_classifier: whether the network may keep its own classifier if the file has none, or one
            of another number of classes.
        prefer: for a file with several networks that fit, the end of the prefix of the one to take.

    Returns:
        The fitted tensors; if no form fits, the misfits of the likeliest form.
    """
    tensors = {key: tensor for key, tensor in read.items() if not key.startswith(tuple(ignore))}
    own = model.state_dict()
    told: Fitted | None = None
    for form in possible_forms(model, tensors, own, prefer):
        fitted = _adapted(model, form, own, new_classifier)
        if not fitted.misfits:
            return fitted
        # Misfits are told with the names of the file (below a prefix), not with converted names.
        if told is None or not form.filtered or (fitted.classes and not told.classes):
            told = fitted
    assert told is not None  # there is always the file's own form
    return told


def _adapted(
    model: nn.Module, form: TensorForm, own: Mapping[str, Tensor], new_classifier: bool
) -> Fitted:
    """Bridge differences in buffers, input channels and number of classes, and find the misfits.

    Args:
        model: the network.
        form: the form of the file's tensors.
        own: the network's state dict.
        new_classifier: whether the network may keep its own classifier.
    """
    notes = list(form.notes)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} - set(own)
    tensors = OrderedDict(
        (key, tensor)
        for key, tensor in form.tensors.items()
        if key in own or not (key in buffers or key.rpartition(".")[2] in _INDEX_BUFFERS)
    )
    for key, tensor in tensors.items():
        if key.endswith(COUNTER) and tensor.is_floating_point():
            # The file was converted to another dtype as a whole, or averaged. Counters in float16
            # may be infinite.
            tensors[key] = tensor.float().nan_to_num(0, 0, 0).round().long()
    # Without versions, modules accept the names of their older versions, and batch norms need no
    # counter. So only those versions are kept without which a module loads nothing.
    tensors._metadata = needed_versions(model)  # type: ignore[attr-defined]
    notes += _adapt_stem(model, tensors, own)
    replaced = _with_own_classifier(model, tensors, own)
    if form.ambiguous:
        return Fitted(
            tensors, (), (form.ambiguous,), remedy="save the state dict of one network alone"
        )
    if replaced is None:
        return Fitted(tensors, tuple(notes), _misfits(model, tensors, own))
    without, classes, remark = replaced
    elsewhere = _misfits(model, without, own)
    if new_classifier and not elsewhere:
        return Fitted(without, (*notes, remark))
    misfits = _misfits(model, tensors, own)
    return Fitted(tensors, tuple(notes), misfits, None if elsewhere else classes)


def _adapt_stem(
    model: nn.Module, tensors: dict[str, Tensor], own: Mapping[str, Tensor]
) -> list[str]:
    """Adapt the first convolution to another number of image channels, as timm does.

    Args:
        model: the network.
        tensors: the tensors of the file, which are changed in place.
        own: the network's state dict.

    Returns:
        Sentences on what was adapted.
    """
    notes = []
    for name in stem_names(model):
        key = f"{name}.weight"
        old, new = tensors.get(key), own.get(key)
        if old is None or new is None or old.shape == new.shape or old.ndim != 4 or new.ndim != 4:
            continue
        if old.shape[0] != new.shape[0] or old.shape[2:] != new.shape[2:]:
            continue
        # The stem may first fold pixels into channels, the same number for each image channel.
        fold = old.shape[1] // _RGB if old.shape[1] % _RGB == 0 else 1
        fold = fold if new.shape[1] % fold == 0 else 1
        if fold > 1 and takes_images(model, (new.shape[1], *input_shape(model, "")[1:])):
            fold = 1  # the images have all these channels
        given, wanted = old.shape[1] // fold, new.shape[1] // fold
        options = {"base_chans": given}
        if "base_chans" not in inspect.signature(adapt_input_conv).parameters:  # timm < 1.0.30
            if given != _RGB:
                continue
            options = {}
        try:
            tensors[key] = adapt_input_conv(wanted, old, **options)
        except (NotImplementedError, AssertionError):
            continue
        notes.append(f"{name} is adapted from {given} input channels to {wanted}")
    return notes


def _with_own_classifier(
    model: nn.Module, tensors: OrderedDict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[OrderedDict[str, Tensor], int, str] | None:
    """Replace a classifier of another number of classes by the network's own.

    Args:
        model: the network.
        tensors: the tensors of the file. A class for the background is removed in place.
        own: the network's state dict.

    Returns:
        The tensors with the network's classifier, the number of classes in the file (0 if it has no
        classifier), and a sentence on it. None if the number of classes is not what differs.
    """
    names = classifier_names(model)
    keys = [key for key in own if key.rpartition(".")[0] in names]
    present = [key for key in keys if key in tensors]
    if not keys or 0 < len(present) < len(keys):
        return None
    ours = own[keys[0]].shape[0]
    offset = (getattr(model, "pretrained_cfg", None) or {}).get("label_offset") or 0
    if offset and present and all(tensors[k].shape[0] == ours + offset for k in present):
        # The file has a further class for the background, which is removed.
        tensors.update({k: tensors[k][offset:] for k in present})
    others = [key for key in present if tensors[key].shape != own[key].shape]
    if present and not others:
        return None
    if any(tensors[key].shape[1:] != own[key].shape[1:] for key in others):
        return None
    found = tensors[others[0]].shape[0] if others else 0
    replaced = OrderedDict({**tensors, **{key: own[key] for key in keys}})
    replaced._metadata = tensors._metadata  # type: ignore[attr-defined]
    why = f"{found} classes and not {ours}" if found else "none"
    remark = f"the classifier ({', '.join(names)}) is initialized anew, since the file has {why}"
    return replaced, found, remark


def _misfits(
    model: nn.Module, tensors: OrderedDict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Find out what keeps a state dict from being loaded, by loading it into a copy of the model.

    Args:
        model: the network.
        tensors: the state dict.
        own: the network's state dict.

    Returns:
        Sentences on the misfits; empty if the state dict fits.
    """
    misshaped = {
        key: f"{key} {_size(tensor)} instead of {_size(own[key])}"
        for key, tensor in tensors.items()
        # Older files store scalars as vectors of one element, which torch accepts.
        if key in own
        and tensor.shape != own[key].shape
        and (tensor.numel(), own[key].ndim) != (1, 0)
    }
    fitting = tensors.copy()
    for key in misshaped:
        del fitting[key]
    fitting._metadata = tensors._metadata  # type: ignore[attr-defined]
    try:
        # Modules may rename keys as they load, so only loading tells which keys are missing.
        result = copy.deepcopy(model).load_state_dict(fitting, strict=False)
    except Exception as error:  # modules may load their state by code of their own
        return (" ".join(str(error).split()).rstrip(".") or "its modules do not accept it",)
    missing = [key for key in result.missing_keys if key not in misshaped]
    found = [
        listed("missing", missing),
        listed("unexpected", result.unexpected_keys),
        listed("shaped", misshaped.values()),
    ]
    return tuple(text for text in found if text)


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
