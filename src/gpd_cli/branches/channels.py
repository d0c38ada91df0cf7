"""Choose the input channels that the identity branch of a wide layer copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def identity_channels(outputs: Iterable[int], inputs: Iterable[int], fan: int) -> Tensor:
    """Choose the wide input channel that each wide output copies in the identity branch.

    The k-th copy of a narrow output takes the k-th copy of the same narrow input channel. The two
    axes may have their copies in different orders. Where an input channel has fewer copies than the
    output, its copies are taken in turn. The first copy of an output takes the first copy of the
    input, so the student's slice of the branch is the student's identity branch.

    Args:
        outputs: for each wide output, the narrow output that it copies.
        inputs: for each wide input channel of a group, the narrow input channel that it copies.
        fan: number of narrow input channels per group; narrow output c takes the narrow input
            channel ``c % fan``.

    Returns:
        For each wide output, a wide input channel within its group, ``[O]``.

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
