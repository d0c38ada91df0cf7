"""Time joint training steps against plain training of both networks, and write the page.

python -m bench.speed [--device cuda] [--rounds 10] [--only resnet18]

Each row is measured in processes of its own, one after the other, and recorded in results/speed;
docs/benchmarks.md is made of the records. Run the command in the folder of the checkout, on a
machine that does nothing else; OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does, before torch is imported

import torch

from bench.speed.case import cases
from bench.speed.measure import measure, peak_memory
from bench.speed.page import PAGE, RECORDS, write_page


def main(arguments: list[str] | None = None) -> int:
    """Measure all rows, or those of some students, and write the page."""
    options = _parse(arguments)
    path = Path(RECORDS) / f"{options.device}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() and options.only else []
    rows = {json.dumps(row["case"]): row for row in before}
    for case in cases(options.device):
        if options.only and case.student not in options.only:
            continue
        figures = in_fresh_process(measure, case, options.device, options.rounds)
        for name in ("joint", "wide"):
            memory = in_fresh_process(peak_memory, case, options.device, name)
            figures[f"{name}_memory"] = memory
        print(case, {name: round(value, 3) for name, value in figures.items()}, flush=True)
        rows[json.dumps(asdict(case))] = {"case": asdict(case), "figures": figures}
    record = {**_circumstances(options), "rows": list(rows.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    write_page(Path())
    print(f"wrote {path} and {PAGE}")
    return 0


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that is called in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _circumstances(options: argparse.Namespace) -> dict[str, Any]:
    device = options.device
    machine = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "versions": {name: version(name) for name in ("torch", "timm")},
        "command": f"python -m bench.speed --device {device} --rounds {options.rounds}",
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="turns that count")
    parser.add_argument("--only", nargs="+", metavar="STUDENT", help="rows of these students")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
