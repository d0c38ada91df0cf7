"""Time joint training steps against plain training of both networks, and write the page.

python -m bench.speed [--device cuda] [--rounds 10] [--only resnet18] [--missing] [--reference DIR]
python -m bench.speed --computed

Each row is measured in new processes, one after the other, and recorded in results/speed;
docs/benchmarks.md is made from the records. Run the command in the folder of the checkout, on a
machine that does nothing else; it takes half an hour to an hour. OMP_NUM_THREADS sets the number of
threads; with one thread on the CPU, times are CPU times. --reference times the authors' code as
well; --computed makes the table of many GPUs, by counting operations.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpd_cli.cli.cpu_memory import keep_freed_memory, use_huge_pages

use_huge_pages()  # before torch is imported, as the command gpd does
keep_freed_memory()

import torch

from bench.fresh_process import in_fresh_process
from bench.speed.case import Case, cases
from bench.speed.forecast import H100, computed_cases, forecast, predict_case
from bench.speed.machine import Machine, attained
from bench.speed.measure import measure, peak_of_step
from bench.speed.page import COMPUTED, PAGE, RECORDS, write_page
from bench.speed.reference import find_code, has_reference, measure_reference
from bench.speed.whole import images_per_second
from gpd_cli.cli.environment import processor
from gpd_cli.errors import GpdError


def main(arguments: list[str] | None = None) -> int:
    """Measure all rows, or those of some students, and write the page."""
    options = _parse(arguments)
    try:
        if options.reference is not None:
            find_code(options.reference)
        path = _compute() if options.computed else _measure(options)
        write_page(Path())
    except GpdError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path} and {PAGE}")
    return 0


def _measure(options: argparse.Namespace) -> Path:
    """Measure rows, and write the record of the device and the page after each of them."""
    path = RECORDS / f"{options.device}.json"
    record = _circumstances(options)
    goes_on = options.only or options.missing
    before = json.loads(path.read_text()) if path.exists() and goes_on else {}
    if before:
        changed = [name for name in record if before[name] != record[name]]
        if changed:
            raise GpdError(
                f"The rows in {path} were measured by `{before['command']}`, and differ from new "
                f"ones in {' and '.join(changed)}; give the same options, or measure all rows, "
                "without --only and --missing."
            )
    rates = in_fresh_process(attained, options.device)
    record["rates"] = before.get("rates", asdict(rates))
    measured = {json.dumps(row["case"]): row for row in before.get("rows", [])}
    wanted = {json.dumps(asdict(case)): case for case in cases(options.device)}
    for key, case in wanted.items():
        if options.only and case.student not in options.only:
            continue
        if options.missing and key in measured:
            continue
        measured[key] = _row(case, Machine(**record["rates"]), options)
        print(json.dumps(_rounded(measured[key])), flush=True)
        # After each row, since a row takes minutes: `--missing` then goes on from what is there.
        rows = [measured[key] for key in wanted if key in measured]
        _write(path, {**record, "rows": rows})
        write_page(Path())
    return path


def _row(case: Case, rates: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a case, and predict its times by count.

    Args:
        case: the case.
        rates: the rates of this machine, for the prediction.
        options: options of the command line.

    Returns:
        The row of the record: ``case``, ``figures``, and ``predicted`` and ``reference`` if any.
    """
    device = options.device
    figures = in_fresh_process(measure, case, device, options.rounds)
    for name in ("joint", "wide"):
        figures[f"{name}_memory"] = in_fresh_process(peak_of_step, case, device, name)
    figures["whole"] = in_fresh_process(images_per_second, case, device)
    row = {"case": asdict(case), "figures": figures}
    if not case.compile and not case.saving:
        row["predicted"] = in_fresh_process(predict_case, case, rates)
    if options.reference is not None and has_reference(case):
        row["reference"] = in_fresh_process(
            measure_reference, case, device, options.rounds, options.reference
        )
    return row


def _compute() -> Path:
    """Count the rows of the table of many GPUs, and write their record."""
    rows = [
        {"case": asdict(case), "figures": in_fresh_process(forecast, case, H100)}
        for case in computed_cases()
    ]
    record = {"command": "python -m bench.speed --computed", "rows": rows}
    _write(COMPUTED, record)
    return COMPUTED


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """A record with numbers rounded to four digits, which is more than the timing is precise to."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _circumstances(options: argparse.Namespace) -> dict[str, Any]:
    device = options.device
    reference = "" if options.reference is None else " --reference GPD"
    machine = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "versions": {name: version(name) for name in ("torch", "timm")},
        "command": f"python -m bench.speed --device {device} --rounds {options.rounds}{reference}",
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="turns that count")
    parser.add_argument("--only", nargs="+", metavar="STUDENT", help="rows of these students")
    parser.add_argument("--missing", action="store_true", help="rows without a record")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="checkout of github.com/guoyongcs/GPD"
    )
    parser.add_argument(
        "--computed", action="store_true", help="the table of many GPUs, by count: nothing is timed"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; at least one turn has to count.")
    students = list(dict.fromkeys(case.student for case in cases(options.device)))
    for student in options.only or ():
        if student not in students:
            parser.error(
                f"--only names {student!r}, which is no row of {options.device}; the students are "
                f"{', '.join(students)}."
            )
    return options


if __name__ == "__main__":
    sys.exit(main())
