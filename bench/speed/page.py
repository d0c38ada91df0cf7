"""The page of benchmarks, docs/benchmarks.md, which is made from the records in results/speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.markdown import table_lines
from bench.speed.forecast import MOVES, PROCESSES, PRODUCTS

PAGE = Path("docs/benchmarks.md")
RECORDS = Path("results/speed")
COMPUTED = RECORDS / "computed.json"

_INTRODUCTION = """\
# Benchmarks

The floor of a joint step is what its two networks cost apart: a plain training step of the student
plus one of the dynamic teacher with its branches merged. [The cost of a step](speed.md) says what
makes up the rest. `make bench` measures on this machine and writes this page, `make bench
DEVICE=cuda` adds the table of a GPU; the records are `results/speed/*.json`.
"""

_MEASURED = """\
## Measured

The three steps take turns in one process, each with the same optimizer; all figures are medians. On
a CPU the process keeps freed memory, [as `gpd fit` does](speed.md#on-the-cpu).

- joint / floor: median of the ratios, turn by turn;
- by count: the same ratio, computed from the operations and bytes of the row's step and the rates
  that the machine attains in a convolution and in a sum (`bench/speed/cost.py`);
- authors: the joint step of the paper's authors over the same floor, where the benchmark had a
  checkout of their code (`--reference DIR`); only convolutions of stride 1 have branches in it.
  Freed memory is kept for it as well;
- merging: share of the joint step in which branches are merged and their gradients computed;
- images/s: of the joint step by itself, and of a whole `gpd fit` on a folder of JPEG files, which
  also decodes and augments them, checks each step's numbers and keeps metrics (by the wall clock);
- memory: peak of a joint step, and of a plain step of the wide network, each above that of the
  program before.

Rows with "recompute_student" or "grad_checkpointing" are with [this option](speed.md#memory),
the plain steps as well where it is theirs.
"""

_MANY = """\
## Many GPUs: computed, not measured

Nothing in this table was measured. Operations and bytes of each step are counted
(`{command}`, without a GPU). The time is that of NVIDIA's H100 SXM, eight to a node:
{products:.0f} % of its peak in products (989 TFLOP/s in bfloat16, 67 in float32), and {moves:.0f} %
of its peaks in memory (3.35 TB/s) and connections (NVLink, 450 GB/s in each direction; 400 Gb/s for
each GPU between nodes). The peaks are those of NVIDIA's data sheets of H100 and DGX H100; the
shares are assumptions. Images of {size} pixels, {batch} on each GPU, ratio {ratio:g}, bfloat16; no
operation is fused with another, and loading takes no time.

- joint / floor: on one GPU;
- all-reduce: how long gradients travel, where those of merged kernels are averaged, as
  [joint runs do](speed.md#several-processes), and where those of main kernel and each branch are;
- on W GPUs: joint / floor, when none of this is hidden behind the backward pass; the floor's two
  networks average their gradients as well.
"""

_MEASURED_HEADER = (
    "student",
    "size",
    "batch",
    "branches",
    "student alone",
    "wide alone",
    "joint",
    "joint / floor",
    "by count",
    "authors",
    "merging",
    "images/s",
    "of `gpd fit`",
    "memory",
    "wide alone",
)


def write_page(root: Path) -> None:
    """Write the page from all records.

    Args:
        root: folder of the checkout.
    """
    parts = [_INTRODUCTION]
    measured = sorted((root / RECORDS).glob("*.json"))
    measured = [path for path in measured if path.name != COMPUTED.name]
    if measured:
        parts += [_MEASURED, *(_measured(json.loads(path.read_text())) for path in measured)]
    if (root / COMPUTED).exists():
        parts.append(_computed(json.loads((root / COMPUTED).read_text())))
    (root / PAGE).write_text("\n".join(parts))


def _measured(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    rates = record["rates"]
    rows = "\n".join(table_lines(_MEASURED_HEADER, map(_row, record["rows"])))
    return (
        f"### {record['machine']}\n\n{record['threads']} thread(s), {record['rounds']} turns, "
        f"{versions}; attained: {rates['flops'] / 1e9:.0f} GFLOP/s in float32, "
        f"{rates['low_flops'] / 1e9:.0f} in bfloat16, {rates['bandwidth'] / 1e9:.1f} GB/s; "
        f"`{record['command']}`.\n\n{rows}\n"
    )


def _computed(record: dict[str, Any]) -> str:
    (size, batch, ratio), *others = {
        tuple(row["case"][name] for name in ("size", "batch", "ratio")) for row in record["rows"]
    }
    assert not others
    text = _MANY.format(
        command=record["command"],
        products=100 * PRODUCTS,
        moves=100 * MOVES,
        size=size,
        batch=batch,
        ratio=ratio,
    )
    header = ["student", "branches", "student alone", "wide alone", "merging", "joint / floor"]
    for processes in PROCESSES:
        header += [
            f"all-reduce, {processes} GPUs: merged first",
            "each branch",
            f"on {processes} GPUs: merged first",
            "each branch",
        ]
    rows = "\n".join(table_lines(header, map(_computed_row, record["rows"])))
    return f"{text}\n{rows}\n"


def _computed_row(row: dict[str, Any]) -> list[str]:
    case, figures = row["case"], row["figures"]
    cells = [case["student"], f"{case['branches']}"]
    cells += [f"{figures[name]:.1f} ms" for name in ("student", "wide", "merging")]
    cells.append(f"**{figures['ratio']:.2f}**")
    for processes in PROCESSES:
        cells += [f"{figures[f'{name}_{processes}']:.1f} ms" for name in ("merged", "each")]
        cells += [f"{figures[f'{name}_ratio_{processes}']:.2f}" for name in ("merged", "each")]
    return cells


def _row(row: dict[str, Any]) -> Sequence[str]:
    case, figures = row["case"], row["figures"]
    branches = f"{case['branches']}"
    if case["branch_width"] != 1:
        branches += f", width {case['branch_width']:g}"
    student = case["student"]
    for word in ("channels_last", "compile"):
        student += f", {word}" if case[word] else ""
    student += f", {case['saving']}" if case["saving"] else ""
    student += "" if case["precision"] == "32" else f", {case['precision']}"
    milliseconds = [f"{figures[name]:.0f} ms" for name in ("student", "wide", "joint")]
    others = [
        f"{row[name]['ratio']:.2f}" if name in row else "" for name in ("predicted", "reference")
    ]
    memory = [f"{figures[name]:.0f} MiB" for name in ("joint_memory", "wide_memory")]
    return (
        student,
        str(case["size"]),
        str(case["batch"]),
        branches,
        *milliseconds,
        f"**{figures['ratio']:.2f}**",
        *others,
        f"{100 * figures['merging']:.0f} %" if "merging" in figures else "",
        *(f"{figures[name]:.1f}" for name in ("images", "whole")),
        *memory,
    )
