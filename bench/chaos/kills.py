"""Comparison of runs that are killed and resumed several times with an undisturbed run."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from bench.chaos.compare import differing
from bench.chaos.runs import STEPS, fit, prepare

_RUN = Path("runs", "run", "version_0")


def kill_and_compare(
    place: Path, draw: random.Random, kills: int, ranks: int, whole: dict[int, Path]
) -> tuple[int, str, list[str]]:
    """Kill a run several times, resume it each time, and compare it with the undisturbed run.

    Args:
        place: folder in which each run gets a folder of its own.
        draw: random generator.
        kills: number of times that the run is killed, at least one.
        ranks: number of processes that train together.
        whole: folders of undisturbed runs by number of processes; a missing one is trained and
            added.

    Returns:
        The number of kills that happened, which is less than `kills` if the run ended before one of
        them; a description of what was done; and a list of differences between the runs.
    """
    if ranks not in whole:
        folder = place / f"whole-{ranks}"
        prepare(folder)
        codes, log = fit(folder, ["-c", "run.yaml", "--data.num_workers", "0"], ranks)
        if any(codes):
            raise RuntimeError(f"The undisturbed run failed ({codes}): {log[-1000:]}")
        whole[ranks] = folder / _RUN
    folder = place / f"killed-{draw.getrandbits(32):08x}"
    prepare(folder)
    # From the third step on, there is a checkpoint to resume from.
    moments = sorted(draw.randrange(3, STEPS) for _ in range(kills))
    told, problems, happened = [], [], 0
    arguments = ["-c", "run.yaml"]
    for step in moments:
        how = draw.choice(("kill", "save"))
        rank = 0 if how == "save" else draw.randrange(ranks)  # only the first process saves
        workers = draw.choice((0, 2))
        wait = draw.random() if how == "save" else draw.random() * 0.4
        plan = f"{how}:{step}:{rank}:{wait:.3f}"
        codes, log = fit(folder, [*arguments, "--data.num_workers", str(workers)], ranks, plan)
        what = f"{how} at step {step} of process {rank} ({workers} workers)"
        if codes[rank] == -signal.SIGKILL:
            happened += 1
            told.append(what)
        else:
            told.append(f"ended before: {what}")
            if codes[rank] != 0:
                problems.append(f"{plan} ended with {codes}: {log[-300:]}")
        if (folder / _RUN / "checkpoints").is_dir():
            arguments = ["--resume", str(_RUN)]
        if codes[rank] == 0:
            break
    if codes[rank] != 0:
        codes, log = fit(folder, [*arguments, "--data.num_workers", "0"], ranks)
        if any(codes):
            problems.append(f"going on ended with {codes}: {log[-300:]}")
    problems += differing(folder / _RUN, whole[ranks])
    left = [path.name for path in folder.rglob(".tmp-*")]
    return happened, f"{ranks} processes, {', '.join(told)}", problems + left
