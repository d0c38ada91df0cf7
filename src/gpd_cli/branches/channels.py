"""The input channel that each wide output copies in the identity branch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def identity_channels(outputs: Iterable[int], inputs: Iterable[int], fan: int) -> Tensor:
    """Identity between two axes of copies: the k-th output copy takes the k-th input copy.

    The two axes may have their copies in different orders. Where inputs have fewer copies, each
    is taken more often. The student's slice, from first copies to first copies, is the identity.

    Args:
        outputs: for each wide output, the narrow output that it copies.
        inputs: for each wide input channel of a group, the narrow input channel that it copies.
        fan: fan-in: narrow input channels per group; output c takes channel ``c % fan``.

    Returns:
        ``[O]``: for each wide output, a wide input channel of its group.

    Example:
        >>> identity_channels([0, 0, 1, 1], [0, 1, 0, 1], 2)
        tensor([0, 2, 1, 3])
    """
    places: dict[int, list[int]] = defaultdict(list)
    for place, channel in enumerate(inputs):
        places[channel].append(place)
    seen: dict[int, int] = defaultdict(int)
    chosen = []
    for channel in outputs:
        copies = places[channel % fan]
        chosen.append(copies[seen[channel] % len(copies)])
        seen[channel] += 1
    return torch.tensor(chosen)
