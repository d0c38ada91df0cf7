"""Summaries of rows: means and standard deviations over seeds, and gains over other rows."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from bench.results.records import Record, Records, accuracy, best_validation
from bench.results.table import Row, Table


@dataclass(frozen=True)
class Spread:
    """The values of a number over seeds, with mean and standard deviation.

    Args:
        values: one value for each seed; at least one value.
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


@dataclass(frozen=True)
class Gain:
    """The accuracy of a row's student minus that of another row's student, in points.

    Args:
        mean: mean of the differences seed by seed.
        seeds: number of seeds that both rows have.
        low: lower end of the 95 % t interval of the mean; None with fewer than three seeds.
        high: upper end of this interval; None with fewer than three seeds.
    """

    mean: float
    seeds: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.2f} ({self.seeds} seed{'s' if self.seeds > 1 else ''})"
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def gain(row: Mapping[int, float], other: Mapping[int, float]) -> Gain | None:
    """Compare two rows on the seeds that both have.

    Runs of the same seed start from equal weights, see the images in the same order, and may share
    a static teacher. So their differences vary less than the accuracies themselves.

    Args:
        row: accuracies of the row's student by seed, in percent.
        other: accuracies of the other row's student by seed, in percent.

    Returns:
        The gain; None if the rows have no seed in common.

    Example:
        >>> str(gain({0: 41.0, 1: 43.0, 2: 42.0}, {0: 40.0, 1: 41.0, 2: 39.0}))
        '+2.00 (-0.48 to +4.48)'
        >>> str(gain({0: 41.0}, {0: 40.0, 1: 41.0}))
        '+1.00 (1 seed)'
    """
    differences = [row[seed] - other[seed] for seed in row if seed in other]
    if not differences:
        return None
    mean, number = statistics.fmean(differences), len(differences)
    if number < 3:
        return Gain(mean, number)
    error = statistics.stdev(differences) / math.sqrt(number)
    margin = float(stdtrit(number - 1, 0.975)) * error  # by the quantile of Student's t
    return Gain(mean, number, mean - margin, mean + margin)


@dataclass(frozen=True)
class Summary:
    """The numbers of a row that has been trained with at least one seed.

    Args:
        row: the row.
        records: records of the row's scored runs.
        student: accuracy of the student in percent, by the metric of the table.
        teacher: accuracy of the dynamic teacher in percent; None without one.
        gap: accuracy of the dynamic teacher minus that of the student, in points; None without a
            dynamic teacher.
        minutes: training time of a run on `hardware`, in minutes; None if no run's time is known.
        hardware: the hardware on which most runs with a known time were trained; None if there are
            no such runs.
        rate: the learning rate.
        gain: gain over the row that this row is compared with; None if both have no seed in common.
        validation_gain: the same gain in validation accuracy; equal to `gain` if this is the metric
            of the table.
        time: ratio of this row's mean training time to that of the row that it is compared with,
            over the runs of each row that were on hardware common to both, possibly one run of
            each; None if there are no such runs.
        wanted: number of seeds that the row should have.
    """

    row: Row
    records: Sequence[Record]
    student: Spread
    teacher: Spread | None
    gap: Spread | None
    minutes: Spread | None
    hardware: str | None
    rate: float
    gain: Gain | None
    validation_gain: Gain | None
    time: float | None
    wanted: int

    @property
    def epochs(self) -> int:
        """Number of epochs of a run."""
        return len(self.records[0]["epochs"]["val/student_top1"])

    @property
    def complete(self) -> bool:
        """Whether every seed of the row has been trained."""
        return len(self.records) == self.wanted


def summarize(records: Records) -> dict[str, Summary]:
    """Summarize the rows of a table that have been trained with at least one seed.

    Args:
        records: the records of the table.

    Returns:
        Summaries by key of the row, in the table's order.
    """
    metric = records.table.metric
    finished = {key: records.finished(row) for key, row in records.table.rows.items()}
    found: dict[str, Summary] = {}
    for key, runs in finished.items():
        if not runs:
            continue
        row = records.table.rows[key]
        other = finished.get(row.versus or "")
        student, times = _spread(runs, "student", metric), _minutes(runs)
        assert student is not None
        hardware = max(times, key=lambda name: len(times[name]), default=None)
        found[key] = Summary(
            row=row,
            records=runs,
            student=student,
            teacher=_spread(runs, "teacher", metric),
            gap=_gap(runs, metric),
            minutes=None if hardware is None else Spread(times[hardware]),
            hardware=hardware,
            rate=runs[0]["learning_rate"],
            gain=_gain(runs, other, metric),
            validation_gain=_gain(runs, other, "validation"),
            time=_relative(times, _minutes(other)) if other else None,
            wanted=len(records.table.seeds_of(row)),
        )
    return found


def compared_by_epoch(table: Table, found: Mapping[str, Summary]) -> list[Summary]:
    """The rows that are drawn in the figure over epochs.

    Args:
        table: the table.
        found: summaries of the table's rows, by key.

    Returns:
        The headline rows, or all rows if the table has no headline; of these, only rows that have
        been trained for the same number of epochs as the first one.
    """
    rows = _headline(table, found)
    return [summary for summary in rows if summary.epochs == rows[0].epochs]


def compared_by_time(table: Table, found: Mapping[str, Summary]) -> list[Summary]:
    """The rows that are drawn in the figure over time.

    Args:
        table: the table.
        found: summaries of the table's rows, by key.

    Returns:
        The headline rows, or all rows if the table has no headline; of these, only rows whose times
        were measured on the most frequent hardware. Empty if there are fewer than two such rows.
    """
    rows = [summary for summary in _headline(table, found) if summary.hardware is not None]
    numbers = Counter(summary.hardware for summary in rows)
    if not numbers or max(numbers.values()) < 2:
        return []
    hardware = numbers.most_common(1)[0][0]
    return [summary for summary in rows if summary.hardware == hardware]


def tuning_scores(records: Records) -> dict[str, Mapping[float, float]]:
    """Results of the tuning runs, for rows whose learning rates have all been tried.

    Returns:
        By key of the row, the student's best validation accuracy by learning rate, in percent.
    """
    found = {}
    for key, row in records.table.rows.items():
        runs = {run.rate: records.read(run) for run in records.tuning(row)}
        if runs and None not in runs.values():
            found[key] = {rate: best_validation(r) for rate, r in runs.items() if rate is not None}
    return found


def _headline(table: Table, found: Mapping[str, Summary]) -> list[Summary]:
    return [found[key] for key in table.headline or table.rows if key in found]


def _spread(runs: Sequence[Record], network: str, metric: str) -> Spread | None:
    values = [accuracy(run, network, metric) for run in runs]
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known else None


def _gap(runs: Sequence[Record], metric: str) -> Spread | None:
    pairs = [(accuracy(r, "teacher", metric), accuracy(r, "student", metric)) for r in runs]
    gaps = tuple(t - s for t, s in pairs if t is not None and s is not None)
    return Spread(gaps) if gaps else None


def _gain(runs: Sequence[Record], others: Sequence[Record] | None, metric: str) -> Gain | None:
    return gain(_by_seed(runs, metric), _by_seed(others or (), metric))


def _by_seed(runs: Sequence[Record], metric: str) -> dict[int, float]:
    scores = {run["seed"]: accuracy(run, "student", metric) for run in runs}
    return {seed: score for seed, score in scores.items() if score is not None}


def _minutes(runs: Sequence[Record]) -> dict[str, tuple[float, ...]]:
    """Training times in minutes, by hardware, of those runs whose time is known."""
    found: dict[str, tuple[float, ...]] = {}
    for run in runs:
        if run["seconds"] is not None:
            name = _hardware(run)
            found[name] = (*found.get(name, ()), run["seconds"] / 60)
    return found


def _hardware(run: Record) -> str:
    """A text with a run's device, instructions, threads and processes, of those that are known.

    A GPU's record has neither instructions nor threads.
    """
    found = run["hardware"]
    threads, processes = found.get("threads"), found.get("processes", 1)
    parts = [found[name] for name in ("device", "instructions") if name in found]
    if threads is not None:
        parts.append(f"{threads} thread{'s' if threads > 1 else ''}")
    if processes > 1:
        parts.append(f"{processes} processes")
    return ", ".join(parts)


def _relative(
    minutes: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]
) -> float | None:
    """The ratio of two rows' mean training times; None if they have no hardware in common.

    If they have several in common, the one on which both rows have the most runs is taken.

    Args:
        minutes: training times of the row in minutes, by hardware.
        others: training times of the other row in minutes, by hardware.
    """
    common = [name for name in minutes if name in others]
    if not common:
        return None
    name = max(common, key=lambda name: min(len(minutes[name]), len(others[name])))
    return statistics.fmean(minutes[name]) / statistics.fmean(others[name])
