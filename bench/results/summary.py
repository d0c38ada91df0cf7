"""What the records of a row amount to: means over seeds, spreads, and gains over other rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.results.records import Record, Records, best_validation
from bench.results.table import Row


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds.

    Args:
        values: one for each seed; at least one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their sample standard deviation; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.deviation:.2f}"

    def __format__(self, spec: str) -> str:
        return format(self.mean, spec) if spec else str(self)


@dataclass(frozen=True)
class Gain:
    """Difference of two rows' means, in points.

    Args:
        row: of the row.
        other: of the row it is compared with.
    """

    row: Spread
    other: Spread

    @property
    def mean(self) -> float:
        """The row's mean minus the other's."""
        return self.row.mean - self.other.mean

    @property
    def error(self) -> float | None:
        """Standard error of the difference; None where a row has a single seed."""
        parts = [(s.deviation, len(s.values)) for s in (self.row, self.other)]
        if any(deviation is None for deviation, _ in parts):
            return None
        return math.sqrt(sum((deviation or 0.0) ** 2 / count for deviation, count in parts))

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")

    def __format__(self, spec: str) -> str:
        return format(self.mean, spec) if spec else str(self)


@dataclass(frozen=True)
class Summary:
    """A row that has been trained, with one seed at least.

    Args:
        row: the row.
        records: of its runs that count.
        student: test accuracy of the student, in percent.
        teacher: that of the dynamic teacher, if there is one.
        gap: the dynamic teacher's minus the student's, in points.
        minutes: of training, for one run.
        rate: the learning rate.
        gain: over the row it is compared with, if that has been trained.
        time: minutes relative to those of that row.
        wanted: how many seeds the table asks for.
    """

    row: Row
    records: Sequence[Record]
    student: Spread
    teacher: Spread | None
    gap: Spread | None
    minutes: Spread
    rate: float
    gain: Gain | None
    time: float | None
    wanted: int

    @property
    def epochs(self) -> int:
        """Epochs of a run."""
        return len(self.records[0]["epochs"]["val/student_top1"])


def summarize(records: Records) -> dict[str, Summary]:
    """Sum up the rows of a table that have been trained, with one seed at least.

    Args:
        records: of the table.

    Returns:
        By key of the row, in the table's order.
    """
    finished = {key: records.finished(row) for key, row in records.table.rows.items()}
    found: dict[str, Summary] = {}
    for key, runs in finished.items():
        if not runs:
            continue
        row = records.table.rows[key]
        other = finished.get(row.versus or "")
        student, minutes = _tested(runs, "student"), _minutes(runs)
        found[key] = Summary(
            row=row,
            records=runs,
            student=student,
            teacher=_tested(runs, "teacher") if "teacher_top1" in runs[0]["test"] else None,
            gap=_gap(runs) if "teacher_top1" in runs[0]["test"] else None,
            minutes=minutes,
            rate=runs[0]["learning_rate"],
            gain=Gain(student, _tested(other, "student")) if other else None,
            time=minutes.mean / _minutes(other).mean if other else None,
            wanted=len(records.table.seeds_of(row)),
        )
    return found


def tuning_scores(records: Records) -> dict[str, Mapping[float, float]]:
    """The student's validation accuracy by learning rate, of rows all of whose rates were tried."""
    found = {}
    for key, row in records.table.rows.items():
        runs = {run.rate: records.read(run) for run in records.tuning(row)}
        if runs and None not in runs.values():
            found[key] = {rate: best_validation(r) for rate, r in runs.items() if rate is not None}
    return found


def _tested(runs: Sequence[Record], network: str) -> Spread:
    return Spread(tuple(run["test"][f"{network}_top1"] for run in runs))


def _gap(runs: Sequence[Record]) -> Spread:
    return Spread(tuple(r["test"]["teacher_top1"] - r["test"]["student_top1"] for r in runs))


def _minutes(runs: Sequence[Record]) -> Spread:
    return Spread(tuple(run["seconds"] / 60 for run in runs))
