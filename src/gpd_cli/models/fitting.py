"""Fit the tensors of a weight file to a network, as timm does for its pretrained networks.

Published files differ from the networks that are to load them. Some differences can be bridged:
another number of classes or input channels, another image size, older names, index buffers that are
no longer stored, a prefix, tensors of a loss. All others are misfits, which are reported.
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
"""Prefixes that wrappers (DDP, Lightning, ``torch.compile``) put before every key."""

_SHOWN = 3  # most keys of each kind that a message names
_RGB = 3
_COUNTER = "num_batches_tracked"
# torchvision's published DenseNets have 'denselayer1.norm.1' for today's 'denselayer1.norm1'.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
# Names of timm's functions that convert published names and sizes to those of a network.
_FILTERS = (
    "checkpoint_filter_fn",
    "pretrained_filter_fn",
    "_filter_fn",
    "_filter_torchvision_pretrained",
)
# Names of tables that follow from the architecture, which only older files store.
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
    for form in _forms(model, tensors, own, prefer):
        fitted = _adapted(model, form, own, new_classifier)
        if not fitted.misfits:
            return fitted
        # Misfits are told with the names of the file (below a prefix), not with converted names.
        if told is None or not form.filtered or (fitted.classes and not told.classes):
            told = fitted
    assert told is not None  # there is always the file's own form
    return told


@dataclass(frozen=True)
class _Form:
    """One form of a file's tensors, under names that a network may have.

    Args:
        tensors: the tensors by name.
        notes: sentences on what was done to the tensors.
        ambiguous: why it is unclear which tensors of the file are meant; empty if it is clear.
        filtered: whether a library's own function has converted names and sizes.
    """

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    ambiguous: str = ""
    filtered: bool = False


def _forms(
    model: nn.Module, read: dict[str, Tensor], own: Mapping[str, Tensor], prefer: str
) -> Iterator[_Form]:
    """Generate the possible forms of a file's tensors, the likeliest first.

    Args:
        model: the network.
        read: the tensors of the file, by name.
        own: the network's state dict.
        prefer: end of the prefix to take, if several networks fit.
    """
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
    """Remove the prefixes (see `PREFIXES`) that every key has.

    Args:
        tensors: the state dict.
        keep: names that are right as they are; if a key is among them, nothing is removed.
    """
    found = dict(tensors)
    # In torch's AveragedModel all keys but the counter begin with 'module.'.
    rest = {key: tensor for key, tensor in found.items() if key != "n_averaged"}
    while rest and not any(key in keep for key in rest):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in rest)), None)
        if prefix is None:
            break
        rest = found = {key.removeprefix(prefix): tensor for key, tensor in rest.items()}
    return found


def _without_losses(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> _Form:
    """Leave out the weights of losses, which some checkpoints have beside the network's."""
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
    """Find the part of a file under a prefix that has everything that the network needs, or None.

    Args:
        model: the network.
        read: the tensors of the file, by name.
        own: the network's state dict.
        prefer: end of the prefix to take, if several parts fit.
    """
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
        ambiguous = f"it contains several networks, under {names}"
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
    """Remove what all keys begin with, up to a dot, as often as there is such a beginning."""
    while tensors:
        roots = {key.partition(".")[0] for key in tensors}
        if len(roots) > 1 or not all("." in key for key in tensors):
            break
        tensors = {key.partition(".")[2]: tensor for key, tensor in tensors.items()}
    return tensors


def _filters(model: nn.Module) -> list[Any]:
    """The functions by which the network's library adapts its published files to the network."""
    if isinstance(model, VisionTransformer):
        return [
            lambda state, network: interpolate_embeddings(
                network.image_size, network.patch_size, OrderedDict(state)
            )
        ]
    # timm's functions are in the module of the network's class, or of the base class from which a
    # user's own network is derived.
    theirs = (c.__module__ for c in type(model).__mro__ if c.__module__.startswith("timm.models."))
    module = sys.modules.get(next(theirs, ""))
    return [getattr(module, name) for name in _FILTERS if hasattr(module, name)]


def _filtered(model: nn.Module, form: _Form, function: Any) -> _Form | None:
    """Convert a form by a library's own function; None if the function fails.

    Args:
        model: the network.
        form: the form to convert.
        function: the library's function, from `_filters`.
    """
    taken = inspect.signature(function).parameters
    # Only DeiT III's files have another name for layer scales, so this option harms no others.
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in taken else {}
    arguments = (model,) if len(taken) > 1 else ()
    try:
        found = function(dict(form.tensors), *arguments, **options)
    except Exception:  # these functions take for granted that the file is one of the library's
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
        if key.endswith(_COUNTER) and tensor.is_floating_point():
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
    for name in _stems(model):
        key = f"{name}.weight"
        old, new = tensors.get(key), own.get(key)
        if old is None or new is None or old.shape == new.shape or old.ndim != 4 or new.ndim != 4:
            continue
        if old.shape[0] != new.shape[0] or old.shape[2:] != new.shape[2:]:
            continue
        # The stem may first fold pixels into channels, the same number for each image channel.
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
    """Names of the network's first layers, whose input is the image."""
    traits = getattr(model, "_traits", None) or {}
    config = getattr(model, "pretrained_cfg", None) or {}
    names = traits.get("first_conv", config.get("first_conv"))
    if names is None:
        names = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ())
    return (names,) if isinstance(names, str) else tuple(names)


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
    names = _classifier(model)
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


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers whose outputs are the logits."""
    named = dict(model.named_modules(remove_duplicate=False))
    config = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    # Some networks have a classifier but do not name it, or name one that they were built without.
    names = tuple(name for name in names if isinstance(named.get(name), nn.Linear | nn.Conv2d))
    if names:
        return names
    ends = [name for name, m in named.items() if name and isinstance(m, nn.Linear | nn.Conv2d)]
    return tuple(ends[-1:])


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


def listed(kind: str, keys: Iterable[str]) -> str:
    """List the first few of some keys as text, such as ``missing a, b, c and 2 more``.

    Args:
        kind: words before the keys.
        keys: the keys; without any, the text is empty.
    """
    keys = list(keys)
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{kind} {', '.join(keys[:_SHOWN])}{more}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
