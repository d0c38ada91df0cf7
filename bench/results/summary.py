"""Summaries of rows: means over seeds, spreads, and gains over other rows."""

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
        values: one value for each seed; at least one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.deviation:.2f}"

    def __format__(self, spec: str) -> str:
        return format(self.mean, spec) if spec else str(self)


@dataclass(frozen=True)
class Gain:
    """The accuracy of a row's student minus that of another row's student, in points.

    Args:
        mean: difference of the means over seeds.
        error: standard error of this difference; None where a row has a single seed.
    """

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")

    def __format__(self, spec: str) -> str:
        return format(self.mean, spec) if spec else str(self)


def gain(row: Mapping[int, float], other: Mapping[int, float]) -> Gain:
    """Compare two rows.

    Runs of one seed start from equal weights and see the images in the same order, and may share a
    static teacher: where the seeds are the same, the standard error is that of the differences.

    Args:
        row: accuracy by seed, in percent.
        other: accuracy by seed of the other row, in percent.

    Example:
        >>> str(gain({0: 41.0, 1: 43.0}, {0: 40.0, 1: 41.0}))
        '+1.50 ± 0.50'
        >>> str(gain({0: 41.0}, {0: 40.0, 1: 41.0}))
        '+0.50'
    """
    mean = statistics.fmean(row.values()) - statistics.fmean(other.values())
    if min(len(row), len(other)) < 2:
        return Gain(mean, None)
    if row.keys() == other.keys():
        parts = [[row[seed] - other[seed] for seed in row]]
    else:
        parts = [list(row.values()), list(other.values())]
    return Gain(mean, math.sqrt(sum(statistics.variance(part) / len(part) for part in parts)))


@dataclass(frozen=True)
class Summary:
    """A row that has been trained, with one seed at least.

    Args:
        row: the row.
        records: records of the row's scored runs.
        student: test accuracy of the student, in percent.
        teacher: test accuracy of the dynamic teacher, in percent, if there is one.
        gap: accuracy of the dynamic teacher minus that of the student, in points.
        minutes: minutes of training of one run; None if every run was killed once, since the time
            of a killed run is unknown.
        rate: the learning rate.
        gain: gain over the row that this one is compared with, if that has been trained.
        time: minutes relative to the minutes of the row that this one is compared with.
        wanted: number of seeds in the table.
    """

    row: Row
    records: Sequence[Record]
    student: Spread
    teacher: Spread | None
    gap: Spread | None
    minutes: Spread | None
    rate: float
    gain: Gain | None
    time: float | None
    wanted: int

    @property
    def epochs(self) -> int:
        """Number of epochs of a run."""
        return len(self.records[0]["epochs"]["val/student_top1"])


def summarize(records: Records) -> dict[str, Summary]:
    """Sum up the rows of a table that have been trained, with one seed at least.

    Args:
        records: the records of the table.

    Returns:
        Summaries by key of the row, in the table's order.
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
            gain=gain(_by_seed(runs), _by_seed(other)) if other else None,
            time=_relative(minutes, _minutes(other)) if other else None,
            wanted=len(records.table.seeds_of(row)),
        )
    return found


def tuning_scores(records: Records) -> dict[str, Mapping[float, float]]:
    """The student's validation accuracy by learning rate, for rows whose rates were all tried."""
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


def _by_seed(runs: Sequence[Record]) -> dict[int, float]:
    return {run["seed"]: run["test"]["student_top1"] for run in runs}


def _minutes(runs: Sequence[Record]) -> Spread | None:
    values = tuple(run["seconds"] / 60 for run in runs if run["seconds"] is not None)
    return Spread(values) if values else None


def _relative(minutes: Spread | None, others: Spread | None) -> float | None:
    return None if minutes is None or others is None else minutes.mean / others.mean
