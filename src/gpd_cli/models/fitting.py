"""Fitting the tensors of a weight file to a network, as timm does for its pretrained networks.

Published files differ from the networks that are to take them in ways that can be bridged: another
number of classes or input channels, another image size, older names, index buffers that are no
longer stored, a prefix, tensors of a loss. Everything else stays a misfit.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from gpd_cli.models.versions import needed_versions

PREFIXES = ("module.", "model.", "_orig_mod.")
"""What wrappers (DDP, Lightning, ``torch.compile``) put before every key."""

_SHOWN = 3  # keys of each kind in a message
_RGB = 3
_COUNTER = "num_batches_tracked"
# torchvision's published DenseNets say 'denselayer1.norm.1' for what is 'denselayer1.norm1' now.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
# What timm calls the functions that turn published names and sizes into a network's own.
_FILTERS = (
    "checkpoint_filter_fn",
    "pretrained_filter_fn",
    "_filter_fn",
    "_filter_torchvision_pretrained",
)
# Tables of numbers that follow from the architecture, which older files store.
_INDEX_BUFFERS = (
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "attention_bias_idxs",
    "total_ops",
    "total_params",
)
_OF_LOSSES = ("criterion", "loss")


@dataclass(frozen=True)
class Fitted:
    """What of a file goes into a network.

    Args:
        tensors: the state dict to load, if nothing is wrong.
        notes: sentences on what was not taken as the file has it.
        misfits: sentences on what keeps the tensors from being loaded.
        classes: number of classes in the file, where the classifier is all that does not fit.
        remedy: what to do about the misfits, where that is known.
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
    """Find the form of a file's tensors that a network takes.

    Args:
        model: stays as it is.
        read: the tensors of the file.
        ignore: beginnings of keys that the network leaves out by design, such as auxiliary heads.
        new_classifier: whether the classifier may stay as it is where the file has none, or one of
            another number of classes.
        prefer: end of the prefix to take, where several networks fit.
    """
    tensors = {key: tensor for key, tensor in read.items() if not key.startswith(tuple(ignore))}
    own = model.state_dict()
    told: Fitted | None = None
    for form in _forms(model, tensors, own, prefer):
        fitted = _adapted(model, form, own, new_classifier)
        if not fitted.misfits:
            return fitted
        # Names are those of the file, below the prefix where there is one.
        if told is None or not form.filtered or (fitted.classes and not told.classes):
            told = fitted
    assert told is not None  # there is always the file's own form
    return told


@dataclass(frozen=True)
class _Form:
    """The tensors of a file under the names that a network may have, and what was done to them."""

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    ambiguous: str = ""  # why it cannot be told what of the file is meant
    filtered: bool = False


def _forms(
    model: nn.Module, read: dict[str, Tensor], own: Mapping[str, Tensor], prefer: str
) -> Iterator[_Form]:
    """The likely forms of a file, the likeliest first."""
    plain = unprefixed(read, keep=own)
    plain = {key if key in own else _OLD_DENSENET.sub(r"\1\2", key): t for key, t in plain.items()}
    below = _below_prefix(model, read, own, prefer)
    forms = [_without_losses(plain, own), *([] if below is None else [below])]
    yield from forms
    for function in _filters(model):
        for form in [*forms, _Form(_without_shared_prefix(read))]:
            if (filtered := _filtered(model, form, function)) is not None:
                yield filtered


def unprefixed(tensors: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
    """Take off what wrappers put before every key.

    Args:
        tensors: the state dict: tensors by name.
        keep: names that are right as they are: where there is one, nothing is taken off.
    """
    found = dict(tensors)
    # The counter of torch's AveragedModel is the one key that its 'module.' does not precede.
    rest = {key: tensor for key, tensor in found.items() if key != "n_averaged"}
    while rest and not any(key in keep for key in rest):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in rest)), None)
        if prefix is None:
            break
        rest = found = {key.removeprefix(prefix): tensor for key, tensor in rest.items()}
    return found


def _without_losses(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> _Form:
    """Leave the weights of losses, which lie beside the network's own in some checkpoints."""
    roots = {key.partition(".")[0] for key in own}
    beside = [
        key
        for key in tensors
        if (root := key.partition(".")[0]) not in roots
        and any(word in root.lower() for word in _OF_LOSSES)
    ]
    left = {key: tensor for key, tensor in tensors.items() if key not in beside}
    return _Form(left, _left(beside))


def _left(keys: Collection[str]) -> list[str]:
    if not keys:
        return []
    return [f"{listed('left in the file, beside the network:', keys)}"]


def _below_prefix(
    model: nn.Module, read: dict[str, Tensor], own: Mapping[str, Tensor], prefer: str
) -> _Form | None:
    """The part of a file under a prefix where everything is that the network needs."""
    classifier = _classifier(model)
    needed = [
        key
        for key in own
        if not key.endswith(_COUNTER) and key.rpartition(".")[0] not in classifier
    ]
    if not needed:
        return None
    anchor = needed[0]
    prefixes = [key.removesuffix(anchor) for key in read if key.endswith(f".{anchor}")]
    found = {p: _under(p, read) for p in prefixes if all(p + key in read for key in needed)}
    if not found:
        return None
    fitting = [p for p, part in found.items() if _shapes_fit(part, own, needed)] or list(found)
    chosen = next((p for p in fitting if p.endswith(prefer)), fitting[0])
    others = [p for p in fitting if p != chosen and not _same(found[p], found[chosen])]
    ambiguous = ""
    if others and not chosen.endswith(prefer):
        names = ", ".join(f"'{p}'" for p in [chosen, *others])
        ambiguous = f"it holds several networks, under {names}"
    beside = [key for key in read if not key.startswith(chosen) and key != "n_averaged"]
    notes = [f"the weights are those under '{chosen}'", *_left(beside)]
    return _Form(found[chosen], notes, ambiguous)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _shapes_fit(part: Mapping[str, Tensor], own: Mapping[str, Tensor], keys: list[str]) -> bool:
    return all(part[key].shape == own[key].shape for key in keys)


def _without_shared_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off whatever all keys begin with, up to a dot."""
    while tensors:
        roots = {key.partition(".")[0] for key in tensors}
        if len(roots) > 1 or not all("." in key for key in tensors):
            break
        tensors = {key.partition(".")[2]: tensor for key, tensor in tensors.items()}
    return tensors


def _filters(model: nn.Module) -> list[Any]:
    """The functions by which a library adapts its published files to a network."""
    if isinstance(model, VisionTransformer):
        return [
            lambda state, network: interpolate_embeddings(
                network.image_size, network.patch_size, OrderedDict(state)
            )
        ]
    # They lie beside the class; a network of a user's own may be derived from one of timm's.
    theirs = (c.__module__ for c in type(model).__mro__ if c.__module__.startswith("timm.models."))
    module = sys.modules.get(next(theirs, ""))
    return [getattr(module, name) for name in _FILTERS if hasattr(module, name)]


def _filtered(model: nn.Module, form: _Form, function: Any) -> _Form | None:
    """The form after a library's own function; None where that cannot make sense of it."""
    taken = inspect.signature(function).parameters
    # DeiT III's files have another name for layer scales, which nothing else has.
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in taken else {}
    arguments = (model,) if len(taken) > 1 else ()
    try:
        found = function(dict(form.tensors), *arguments, **options)
    except Exception:  # they take for granted that the file is one of theirs
        return None
    tensors = {k: t for k, t in found.items() if isinstance(t, Tensor)}
    resized = [
        key for key, t in tensors.items() if key in form.tensors and _resized(t, form.tensors[key])
    ]
    notes = [listed("resampled for this image size:", resized)] if resized else []
    return _Form(tensors, [*form.notes, *notes], form.ambiguous, True)


def _resized(new: Tensor, old: Tensor) -> bool:
    return new.shape != old.shape and new.numel() != old.numel()


def _adapted(
    model: nn.Module, form: _Form, own: Mapping[str, Tensor], new_classifier: bool
) -> Fitted:
    """Bridge buffers, channels and class count, and try out what comes of it."""
    notes = list(form.notes)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)} - set(own)
    tensors = OrderedDict(
        (key, tensor)
        for key, tensor in form.tensors.items()
        if key in own or not (key in buffers or key.rpartition(".")[2] in _INDEX_BUFFERS)
    )
    for key, tensor in tensors.items():
        if key.endswith(_COUNTER) and tensor.is_floating_point():
            # Of a file that was converted as a whole, or averaged; a float16 may be infinite.
            tensors[key] = tensor.float().nan_to_num(0, 0, 0).round().long()
    # Versions are left out, which makes modules accept the names of their older versions and batch
    # norms do without their counter.
    tensors._metadata = needed_versions(model)  # type: ignore[attr-defined]
    notes += _adapt_stem(model, tensors, own)
    replaced = _with_own_classifier(model, tensors, own)
    if form.ambiguous:
        return Fitted(tensors, (), (form.ambiguous,), remedy="save the one that is meant alone")
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
    """Let the first convolution take another number of channels, as timm does; in place."""
    notes = []
    for name in _stems(model):
        key = f"{name}.weight"
        old, new = tensors.get(key), own.get(key)
        if old is None or new is None or old.shape == new.shape or old.ndim != 4 or new.ndim != 4:
            continue
        if old.shape[0] != new.shape[0] or old.shape[2:] != new.shape[2:]:
            continue
        # A stem may fold pixels into channels first, as many for each channel of the image.
        fold = old.shape[1] // _RGB if old.shape[1] % _RGB == 0 else 1
        fold = fold if new.shape[1] % fold == 0 else 1
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


def _stems(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that see the image."""
    traits = getattr(model, "_traits", None) or {}
    config = getattr(model, "pretrained_cfg", None) or {}
    names = traits.get("first_conv", config.get("first_conv"))
    if names is None:
        names = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ())
    return (names,) if isinstance(names, str) else tuple(names)


def _with_own_classifier(
    model: nn.Module, tensors: OrderedDict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[OrderedDict[str, Tensor], int, str] | None:
    """Put the network's own classifier in the place of one of other classes.

    Returns:
        The tensors, the number of classes in the file (0 where it has no classifier), and what is
        to be said; None where the number of classes is not what differs.
    """
    names = _classifier(model)
    keys = [key for key in own if key.rpartition(".")[0] in names]
    present = [key for key in keys if key in tensors]
    if not keys or 0 < len(present) < len(keys):
        return None
    ours = own[keys[0]].shape[0]
    offset = (getattr(model, "pretrained_cfg", None) or {}).get("label_offset") or 0
    if offset and present and all(tensors[k].shape[0] == ours + offset for k in present):
        tensors.update({k: tensors[k][offset:] for k in present})  # a class for the background
    others = [key for key in present if tensors[key].shape != own[key].shape]
    if present and not others:
        return None
    if any(tensors[key].shape[1:] != own[key].shape[1:] for key in others):
        return None
    found = tensors[others[0]].shape[0] if others else 0
    replaced = OrderedDict({**tensors, **{key: own[key] for key in keys}})
    replaced._metadata = tensors._metadata  # type: ignore[attr-defined]
    why = f"{found} classes and not {ours}" if found else "none"
    return replaced, found, f"the classifier ({', '.join(names)}) starts anew, the file has {why}"


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that end in the logits."""
    named = dict(model.named_modules(remove_duplicate=False))
    config = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    # Some have a classifier and no name for it, or a name for what they were built without.
    names = tuple(name for name in names if isinstance(named.get(name), nn.Linear | nn.Conv2d))
    if names:
        return names
    ends = [name for name, m in named.items() if name and isinstance(m, nn.Linear | nn.Conv2d)]
    return tuple(ends[-1:])


def _misfits(
    model: nn.Module, tensors: OrderedDict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[str, ...]:
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
    except Exception as error:  # modules may load by code of their own
        return (" ".join(str(error).split()).rstrip(".") or "its modules refuse it",)
    missing = [key for key in result.missing_keys if key not in misshaped]
    found = [
        listed("missing", missing),
        listed("unexpected", result.unexpected_keys),
        listed("shaped", misshaped.values()),
    ]
    return tuple(text for text in found if text)


def listed(kind: str, keys: Iterable[str]) -> str:
    """Name the first few of some keys, after what they are; nothing where there are none."""
    keys = list(keys)
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{kind} {', '.join(keys[:_SHOWN])}{more}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
