"""Which input channel each wide output hands on, in the identity branch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def identity_channels(outputs: Iterable[int], inputs: Iterable[int], fan: int) -> Tensor:
    """Identity between two axes of copies: the k-th copy of a channel hands on the k-th.

    The two axes may lay their copies out differently, and where one has fewer, its copies are
    handed on more often. The student's slice, from first copies to first copies, is the identity.

    Args:
        outputs: for each wide output, the narrow output it copies.
        inputs: for each wide input channel of a group, the narrow one it copies.
        fan: narrow input channels per group; output c hands on channel ``c % fan`` of its group.

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
