"""The first process of a run finds the width plan and certificate; the others receive both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from gpd_cli.distributed.first_process import current_exchange
from gpd_cli.errors import ExpansionError, GpdError
from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.plan import WidthPlan


def grown_once(grow: Callable[..., Pair]) -> Pair:
    """Grow the same pair in every process of a run, with one search for the width plan.

    The first process finds the plan and certifies the expansion; the others build their pairs from
    this plan. The pairs are equal, since all processes have the same seed.

    Args:
        grow: function that makes the pair. When it is given a ``plan`` and its ``certificate``, it
            neither searches for a plan nor compares the networks.

    Raises:
        ExpansionError: in every other process, when the first one fails to grow its pair; the
            first process raises the error itself.
    """
    exchange = current_exchange()
    if exchange is None:
        return grow()
    if not exchange.is_first:
        found = exchange.receive()
        if "error" in found:
            raise ExpansionError(found["error"])
        plan, certificate = WidthPlan.from_dict(found["plan"]), found["certificate"]
        return grow(plan=plan, certificate=Certificate(**certificate))
    try:
        pair = grow()
    except Exception as error:
        text = str(error) if isinstance(error, GpdError) else f"{type(error).__name__}: {error}"
        exchange.give({"error": text})
        raise
    exchange.give(what_was_found(pair))
    return pair


def what_was_found(pair: Pair) -> dict[str, Any]:
    """Convert the plan and the certificate of a pair to plain values (JSON).

    Args:
        pair: a pair that was grown by `gpd_cli.expand`.
    """
    assert pair.certificate is not None
    return {"plan": pair.plan.to_dict(), "certificate": asdict(pair.certificate)}
