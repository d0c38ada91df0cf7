"""The number of trials of a whole search, which may take several runs of the network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Trials:
    """Runs of containers that failed so far, in all runs of the network.

    Args:
        count: their number.
    """

    count: int = 0
