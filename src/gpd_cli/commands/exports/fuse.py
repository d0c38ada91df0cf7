"""Folding of batch norms into the convolutions before them, in a traced program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_NORM = torch.ops.aten.batch_norm.default


def fuse_batch_norms(program: fx.GraphModule) -> int:
    """Fold batch norms into convolutions, in place.

    A batch norm is folded if it is the only operation that uses the output of a convolution.

    Args:
        program: the output of ``torch.export.export(...).module()``, for a network in eval mode.

    Returns:
        The number of batch norms that were folded.
    """
    graph, folded = program.graph, 0
    for norm in list(graph.nodes):
        if norm.op != "call_function" or norm.target is not _NORM:
            continue
        conv = norm.args[0]
        if conv.target not in _CONVOLUTIONS or len(conv.users) != 1 or norm.args[5]:
            continue
        parameters = _tensors(program, [*conv.args[1:2], _bias(conv), *norm.args[1:5]])
        if parameters is None:
            continue
        # Half precision would round the norm's factor and offset as well as the folded kernel.
        single: list[Any] = [_at_least_single(value) for value in parameters]
        weight, bias, gamma, beta, mean, variance = single
        fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.args[7], gamma, beta)
        with graph.inserting_before(conv):
            for place, name, value in zip((1, 2), ("weight", "bias"), fused, strict=True):
                attribute = f"fused_{folded}_{name}"
                stored = value.detach().to(parameters[0].dtype)
                program.register_parameter(attribute, nn.Parameter(stored, False))
                _set_argument(conv, place, graph.get_attr(attribute))
        norm.replace_all_uses_with(conv)
        graph.erase_node(norm)
        folded += 1
    graph.eliminate_dead_code()
    program.delete_all_unused_submodules()
    program.recompile()
    return folded


def _at_least_single(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _set_argument(node: fx.Node, place: int, value: fx.Node) -> None:
    arguments = list(node.args)
    arguments += [None] * (place + 1 - len(arguments))
    arguments[place] = value
    node.args = tuple(arguments)


def _tensors(program: fx.GraphModule, nodes: list[Any]) -> list[Any] | None:
    """The stored tensors that nodes read; None if a node's value is computed instead.

    Args:
        program: the traced program.
        nodes: nodes of its graph; None in the list stands for a missing tensor, and is kept.
    """
    found: list[Any] = []
    for node in nodes:
        if node is None:
            found.append(None)
        elif isinstance(node, fx.Node) and node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(program.get_submodule(owner), leaf)
            assert isinstance(value, Tensor)
            found.append(value.detach())
        else:
            return None
    return found
