"""The summary table that `expand` and `extract` print, and the numbers in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpd_cli.teacher.build import widen_module
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.running.copying import copy_network


@dataclass(frozen=True)
class Cost:
    """Size and compute of a network.

    Args:
        parameters: number of parameters.
        macs: number of multiply-adds of convolutions, matrix products and attention for one image.
    """

    parameters: int
    macs: int


def cost(network: nn.Module, shape: Sequence[int], plan: WidthPlan | None = None) -> Cost:
    """Count parameters and multiply-adds.

    Args:
        network: a plain network, which is not changed.
        shape: shape of an image, ``(C, H, W)``.
        plan: a width plan of the network; if given, the wide network with merged branches is
            counted in place of the network itself.
    """
    tensors = (*network.parameters(), *network.buffers())
    # The device "meta" needs neither memory nor arithmetic, but not every network's code runs on
    # it. On the CPU, torch's fused attention would not be counted.
    copy = copy_network(network, tensors).to("meta")
    try:
        return _cost(copy, shape, plan)
    except Exception:  # the network's code reads values of tensors, which "meta" does not have
        return _cost(copy_network(network, tensors if plan is None else ()), shape, plan)


def _cost(network: nn.Module, shape: Sequence[int], plan: WidthPlan | None) -> Cost:
    if plan is not None:
        widen_module(network, plan)
    weight = next(network.parameters())
    image = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(image)
    parameters = sum(p.numel() for p in network.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)


def count(number: int) -> str:
    """Format a number with three digits and a unit: k, M or G."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a summary as a table.

    Args:
        title: title of the table.
        rows: pairs of title and text, one for each row.
    """
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    Console(highlight=False, soft_wrap=False).print(table)
