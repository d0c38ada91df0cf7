"""``python -m bench.chaos``: kill runs at random moments and let their disks fail."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import gpd_cli.cli.command_line  # noqa: F401 - imported once, since all runs are forked from here
from bench.chaos.disks import FAULTS, strike_disk
from bench.chaos.kills import kill_and_compare


def main(arguments: list[str] | None = None) -> int:
    """Kill runs, let disks fail, and print what went wrong.

    Args:
        arguments: arguments of the command line; by default those of this process.

    Returns:
        0 if nothing went wrong and everything could be tested, otherwise 1.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (20)")
    parser.add_argument("--a_run", type=int, default=4, help="kills of one run (4)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="to draw from (1 2)")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (0)")
    chosen = parser.parse_args(arguments)
    if chosen.a_run < 1:
        parser.error(f"--a_run is {chosen.a_run}; a run has to be killed at least once.")
    draw, wrong, done, whole = random.Random(chosen.seed), 0, 0, {}
    with tempfile.TemporaryDirectory() as place:
        # A run may end before it is killed; further runs are then started, up to a limit.
        for _ in range(2 * chosen.kills):
            kills = min(chosen.a_run, chosen.kills - done)
            if kills == 0:
                break
            ranks = draw.choice(chosen.ranks)
            happened, what, different = kill_and_compare(Path(place), draw, kills, ranks, whole)
            done += happened
            wrong += bool(different)
            print(f"{what}: {'; '.join(different[:5]) or 'equal bit for bit'}", flush=True)
        if done < chosen.kills:
            wrong += 1
            print(f"not tested: only {done} of {chosen.kills} kills happened", flush=True)
        for fault in chosen.faults:
            said, problem = strike_disk(Path(place) / fault, fault)
            wrong += bool(problem)
            print(f"{fault}: {problem or 'nothing lost'} ({said})", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
