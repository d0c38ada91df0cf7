"""The forms that a weight file's tensors may have for a network: other names, prefixes, sizes."""

from __future__ import annotations

import inspect
import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from gpd_cli.models.end_layers import classifier_names

PREFIXES = ("module.", "model.", "_orig_mod.")
"""Prefixes that wrappers (DDP, Lightning, ``torch.compile``) put before every key."""
COUNTER = "num_batches_tracked"
"""Local name of the buffer in which a batch norm counts its batches."""

_SHOWN = 3  # most keys of each kind that a message names
# torchvision's published DenseNets have 'denselayer1.norm.1' for today's 'denselayer1.norm1'.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
# Names of timm's functions that convert published names and sizes to those of a network.
_FILTERS = (
    "checkpoint_filter_fn",
    "pretrained_filter_fn",
    "_filter_fn",
    "_filter_torchvision_pretrained",
)
_LOSS_WORDS = ("criterion", "loss")


@dataclass(frozen=True)
class TensorForm:
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


def possible_forms(
    model: nn.Module, read: dict[str, Tensor], own: Mapping[str, Tensor], prefer: str
) -> Iterator[TensorForm]:
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
        for form in [*forms, TensorForm(_without_shared_prefix(read))]:
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


def _without_losses(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> TensorForm:
    """Leave out the weights of losses, which some checkpoints have beside the network's."""
    roots = {key.partition(".")[0] for key in own}
    beside = [
        key
        for key in tensors
        if (root := key.partition(".")[0]) not in roots
        and any(word in root.lower() for word in _LOSS_WORDS)
    ]
    left = {key: tensor for key, tensor in tensors.items() if key not in beside}
    return TensorForm(left, _left(beside))


def _left(keys: Collection[str]) -> list[str]:
    return [listed("left in the file, beside the network:", keys)] if keys else []


def _below_prefix(
    model: nn.Module, read: dict[str, Tensor], own: Mapping[str, Tensor], prefer: str
) -> TensorForm | None:
    """Find the part of a file under a prefix that has everything that the network needs, or None.

    Args:
        model: the network.
        read: the tensors of the file, by name.
        own: the network's state dict.
        prefer: end of the prefix to take, if several parts fit.
    """
    classifier = classifier_names(model)
    needed = [
        key for key in own if not key.endswith(COUNTER) and key.rpartition(".")[0] not in classifier
    ]
    if not needed:
        return None
    anchor = needed[0]
    prefixes = [key.removesuffix(anchor) for key in read if key.endswith(f".{anchor}")]
    found = {p: _under(p, read) for p in prefixes if all(p + key in read for key in needed)}
    if not found:
        return None
    fitting = [p for p, part in found.items() if _shapes_fit(part, own, needed)] or list(found)
    preferred = [p for p in fitting if f".{p}".endswith(f".{prefer}")]
    chosen = next(iter(preferred), fitting[0])
    others = [p for p in fitting if p != chosen and not _same(found[p], found[chosen])]
    ambiguous = ""
    if others and not preferred:
        names = ", ".join(f"'{p}'" for p in [chosen, *others])
        ambiguous = f"it contains several networks, under {names}"
    beside = [key for key in read if not key.startswith(chosen) and key != "n_averaged"]
    notes = [f"the weights are those under '{chosen}'", *_left(beside)]
    return TensorForm(found[chosen], notes, ambiguous)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _shapes_fit(part: Mapping[str, Tensor], own: Mapping[str, Tensor], keys: list[str]) -> bool:
    return all(part[key].shape == own[key].shape for key in keys)


def _without_shared_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the first part of all keys, up to a dot, as long as all keys share this part."""
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


def _filtered(model: nn.Module, form: TensorForm, function: Any) -> TensorForm | None:
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
    return TensorForm(tensors, [*form.notes, *notes], form.ambiguous, True)


def _resized(new: Tensor, old: Tensor) -> bool:
    return new.shape != old.shape and new.numel() != old.numel()


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
