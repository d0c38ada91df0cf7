"""``python -m bench.fuzz``: run commands on damaged files and options, and judge the outcome."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Imports everything that the commands need, once for all cases, which are forked from here.
import gpd_cli.cli.command_line  # noqa: F401
from bench.fuzz.cases import KINDS, Base
from bench.fuzz.run import run_kind


def main() -> int:
    """Run the cases, print a table and what went wrong, and return 1 if anything did."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="cases of each kind (500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (0)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", type=int, help="number of the one case to run, shown in full")
    chosen = parser.parse_args()
    wrong = 0
    print(f"{'kind':14} {'cases':>5} {'refused':>8} {'taken':>6} {'wrong':>6} {'longest':>8}")
    with tempfile.TemporaryDirectory() as place:
        base = Base.made_in(Path(place))
        for kind in chosen.kinds:
            numbers = range(chosen.count) if chosen.only is None else [chosen.only]
            found: Counter[str] = Counter()
            longest, failures = 0.0, []
            for number, result in run_kind(kind, base, numbers, chosen.seed, Path(place)):
                found[result.verdict] += 1
                longest = max(longest, result.seconds)
                if chosen.only is not None:
                    print(result)
                if number % 25 == 24:
                    print(f"{kind}: {number + 1}", file=sys.stderr, flush=True)
                if result.verdict not in ("refused", "taken"):
                    failures.append((number, result))
            wrong += len(failures)
            print(
                f"{kind:14} {found.total():5} {found['refused']:8} {found['taken']:6} "
                f"{len(failures):6} {longest:6.1f} s",
                flush=True,
            )
            for number, result in failures:
                print(f"  {number}: {result.verdict}: {result.damage}: {result.text}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
