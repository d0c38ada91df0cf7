"""Prefixes in the names of networks, which say where a network is from."""

from __future__ import annotations

TORCHVISION = "torchvision/"
"""Prefix of the networks of torchvision."""
REUSED = "simkd/"
"""Prefix of networks that end in their static teacher's classifier; it precedes any other."""


def is_of_torchvision(name: str) -> bool:
    """Whether the network of a name, or the body of a `ReusedClassifier`, is torchvision's."""
    return name.removeprefix(REUSED).startswith(TORCHVISION)
