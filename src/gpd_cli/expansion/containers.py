"""What is known by name: attributes of container modules that hold a head count or a width.

Everything else about a network is found by running it. A container whose `forward` reads such an
attribute (to reshape into heads, say) has to be told the wide value; one that merely stores it is
not harmed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gpd_cli.expansion.layers import Heads
from gpd_cli.expansion.plan import TensorPlan, copies

HEAD_COUNTS = ("num_heads", "n_heads", "nhead", "heads")
"""Attributes that count attention heads: heads are copied, their width stays."""

WIDTHS = ("dim", "embed_dim", "hidden_dim", "attn_dim", "attn_out_dim", "inner_dim", "num_features")
"""Attributes that hold a number of channels."""


def head_count(module: nn.Module) -> int | None:
    """The number of attention heads of a container, or None if it is no attention."""
    for name in HEAD_COUNTS:
        value = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def head_layout(module: nn.Module, inner_width: int | None) -> Heads | None:
    """How an attention container splits its channels.

    Args:
        module: the container.
        inner_width: the input width of its last layer, which takes all heads side by side.
    """
    count = head_count(module)
    if count is None:
        return None
    width = getattr(module, "head_dim", None)
    if not isinstance(width, int):
        width = inner_width // count if inner_width and inner_width % count == 0 else None
    return None if width is None else Heads(count, width)


def container_attributes(module: nn.Module, ratio: float) -> dict[str, Any]:
    """The wide values of a container's attributes.

    Args:
        module: the narrow container.
        ratio: the expansion ratio.
    """
    attributes: dict[str, Any] = {}
    for name in HEAD_COUNTS:
        value = getattr(module, name, None)
        if isinstance(value, int):
            attributes[name] = round(value * ratio)
    for name in WIDTHS:
        value = getattr(module, name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        count, width = head_count(module), getattr(module, "head_dim", None)
        if count and isinstance(width, int) and value == count * width:
            attributes[name] = round(count * ratio) * width
        else:
            attributes[name] = round(value * ratio)
    return attributes


def container_tensors(module: nn.Module, widths: set[int], ratio: float) -> dict[str, TensorPlan]:
    """How a container's own parameters (tokens, position embeddings, bias tables) widen.

    Args:
        module: the narrow container.
        widths: the channel counts that widen inside it.
        ratio: the expansion ratio.

    Returns:
        Plans by local parameter name. The axis that widens is the one as long as the head count
        or as a channel count; the last of them if there are several.
    """
    heads = head_count(module)
    plans: dict[str, TensorPlan] = {}
    for name, parameter in module.named_parameters(recurse=False):
        for axis in reversed(range(parameter.ndim)):
            size = parameter.shape[axis]
            if (size > 1 and size in widths) or size == heads:
                maps = [None] * parameter.ndim
                plans[name] = TensorPlan((*maps[:axis], copies(size, ratio), *maps[axis + 1 :]))
                break
    return plans
