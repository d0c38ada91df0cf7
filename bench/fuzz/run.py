"""Running of all cases of one kind."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.fuzz.cases import KINDS, Base
from bench.fuzz.isolate import run_forked
from bench.fuzz.verdict import judge


@dataclass(frozen=True)
class Result:
    """The result of a case.

    Args:
        verdict: ``refused``, ``taken``, or a word for what is wrong.
        damage: description of the damage.
        text: the message of the command, or a text that shows what is wrong.
        seconds: CPU time of the command in seconds.
    """

    verdict: str
    damage: str
    text: str
    seconds: float


def run_kind(
    kind: str, base: Base, numbers: Iterable[int], seed: int, place: Path
) -> Iterator[tuple[int, Result]]:
    """Run cases of one kind, each with its own random generator.

    Args:
        kind: the kind of the cases, a key of `KINDS`.
        base: the intact files from which damaged ones are made.
        numbers: numbers of the cases; the random draws of a case depend on its number.
        seed: seed of all random draws.
        place: folder in which each case gets a folder of its own.

    Yields:
        The number of each case, and its result.
    """
    expected = {"checkpoint": base.student, "weights": base.expanded}.get(kind)
    if kind == "expanded":  # the expected output is the student extracted from the intact file
        expected = place / "of_expanded.pth"
        arguments = ["extract", "--ckpt_path", str(base.expanded), "--output", str(expected)]
        run_forked(place, arguments)
    if kind == "weights":
        expected = place / "of_weights.safetensors"
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=place))
        draw = random.Random(f"{seed} {kind} {number}")
        case = KINDS[kind](draw, base, folder)
        if kind == "weights" and expected is not None and not expected.exists():
            whole = [str(base.student) if "damaged.pth" in a else a for a in case.arguments]
            run_forked(place, [*whole[:-1], str(expected)])
        outcome = run_forked(folder, case.arguments)
        verdict, text = judge(case, outcome, folder, expected)
        shutil.rmtree(folder)
        yield number, Result(verdict, case.damage, text, outcome.seconds)
