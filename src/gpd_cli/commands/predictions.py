"""The table that `predict` writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from gpd_cli.files import atomic_path


def write_predictions(
    path: Path, batches: Sequence[Mapping[str, Tensor]], class_names: Sequence[str] | None
) -> None:
    """Write a row per image, atomically.

    Args:
        path: the file to write.
        batches: per batch, each network's class probabilities, ``[B, C]``.
        class_names: names by class number; numbers are written without them.
    """
    networks = list(batches[0])
    header = ["image", *(f"{n}_{what}" for n in networks for what in ("class", "probability"))]
    number = 0
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for batch in batches:
            tops = [batch[network].max(dim=1) for network in networks]
            for row in range(len(tops[0].values)):
                cells: list[object] = [number]
                for top in tops:
                    label = int(top.indices[row])
                    name = class_names[label] if class_names else label
                    cells += [name, f"{float(top.values[row]):.6f}"]
                writer.writerow(cells)
                number += 1
