"""Loaders of any kind leave out the batches that a resumed run has seen."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from gpd_cli.data.skipping import skip_once

NUMBERS = list(range(12))


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(NUMBERS)


class Counted(Numbers):
    def __len__(self) -> int:
        return len(NUMBERS)


class Triples:
    """Batches of a user's own making, with neither sampler nor batch size."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([NUMBERS[k : k + 3] for k in range(0, 12, 3)])

    def __len__(self) -> int:
        return 4


class Own:
    """A loader that is not torch's."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(12).view(4, 3))


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(NUMBERS, batch_size=3),
    "single images": lambda: DataLoader(NUMBERS, batch_size=None),
    "stream": lambda: DataLoader(Numbers(), batch_size=3),
    "stream of known length": lambda: DataLoader(Counted(), batch_size=3),
    "own batches": lambda: DataLoader(NUMBERS, batch_sampler=Triples()),  # type: ignore[arg-type]
    "own loader": Own,
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_first_pass_leaves_out_what_was_seen(name: str) -> None:
    def numbers() -> list[int]:
        return [int(n) for batch in loader for n in torch.as_tensor(batch).view(-1)]

    loader = LOADERS[name]()
    size = 1 if name == "single images" else 3
    skip_once(loader, 2)
    assert numbers() == NUMBERS[2 * size :]
    assert numbers() == NUMBERS
    skip_once(loader, 1)
    assert numbers() == NUMBERS[size:]
