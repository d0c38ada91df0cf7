"""The page of benchmarks, docs/benchmarks.md, made of the records in results/speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path("docs/benchmarks.md")
RECORDS = Path("results/speed")

_INTRODUCTION = """\
# Benchmarks

The floor of a joint step is what its two networks cost apart: a plain training step of the student
plus one of the dynamic teacher with its branches merged. The three steps take turns in one process,
each with the same optimizer; all figures are medians. `make bench` measures again and writes this
page; `make bench DEVICE=cuda` adds the table of a GPU. The records are in
[results/speed](../results/speed) as JSON.

- joint / floor: median of the ratios, turn by turn;
- merging: share of the joint step in which branches are merged and their gradients computed;
- images/s: of the joint step, without loading;
- memory: peak of a joint step, and of a plain step of the wide network, each above that of the
  program before.
"""

_HEADER = (
    "student",
    "size",
    "batch",
    "branches",
    "student alone",
    "wide alone",
    "joint",
    "joint / floor",
    "merging",
    "images/s",
    "memory",
    "wide alone",
)


def write_page(root: Path) -> None:
    """Write the page of all records.

    Args:
        root: folder of the checkout.
    """
    parts = [_INTRODUCTION]
    for path in sorted((root / RECORDS).glob("*.json")):
        record = json.loads(path.read_text())
        parts.append(_table(record))
    (root / PAGE).write_text("\n".join(parts))


def _table(record: dict[str, Any]) -> str:
    rows = [_row(row["case"], row["figures"]) for row in record["rows"]]
    cells = [_HEADER, ["---"] * len(_HEADER), *rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"## {record['machine']}\n\n{record['threads']} thread(s), {record['rounds']} turns, "
        f"{versions}; `{record['command']}`.\n\n{table}\n"
    )


def _row(case: dict[str, Any], figures: dict[str, float]) -> Sequence[str]:
    branches = f"{case['branches']}"
    if case["branch_width"] != 1:
        branches += f", width {case['branch_width']:g}"
    student = case["student"]
    for word in ("channels_last", "compile"):
        student += f", {word}" if case[word] else ""
    student += "" if case["precision"] == "32" else f", {case['precision']}"
    milliseconds = [f"{figures[name]:.0f} ms" for name in ("student", "wide", "joint")]
    memory = [f"{figures[name]:.0f} MiB" for name in ("joint_memory", "wide_memory")]
    return (
        student,
        str(case["size"]),
        str(case["batch"]),
        branches,
        *milliseconds,
        f"**{figures['ratio']:.2f}**",
        f"{100 * figures['merging']:.0f} %",
        f"{figures['images']:.0f}",
        *memory,
    )
