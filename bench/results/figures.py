"""The figures of the page of results, which are made from the records only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.results.records import Record, Records
from bench.results.summary import Summary, compared_by_epoch, compared_by_time
from bench.results.table import Table

_COLOURS = (*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2])
_COLOURS += tuple(colormaps["tab20b"].colors)


def draw_figures(records: Records, found: Mapping[str, Summary], folder: Path) -> None:
    """Write the figures ``TABLE_accuracy.png``, ``TABLE_gap.png`` and ``TABLE_time.png``.

    If there are no rows to compare, the figure is not drawn, and an older file is removed.

    Args:
        records: the records of a table.
        found: summaries of the table's rows, by key.
        folder: folder to write to.
    """
    table = records.table
    by_epoch = compared_by_epoch(table, found) if found else []
    by_time = compared_by_time(table, found)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("accuracy", _accuracy(found, table.metric) if found else None),
        ("gap", _gap(by_epoch, table) if by_epoch else None),
        ("time", _time(by_time, table) if by_time else None),
    ):
        path = folder / f"{table.name}_{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        FigureCanvasAgg(figure)
        # Matplotlib's version is left out of the file, so that equal records give equal files.
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _colour(summary: Summary, table: Table) -> Sequence[float]:
    """The colour of a row, which is the same in all figures and does not depend on other rows."""
    return _COLOURS[list(table.rows).index(summary.row.key) % len(_COLOURS)]


def _accuracy(found: Mapping[str, Summary], metric: str) -> Figure:
    """A figure with a line for each row, which has a point per seed and a bar at the mean."""
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, summary in enumerate(reversed(found.values())):
        axes.plot(summary.student.values, [place] * len(summary.records), "o", color="tab:blue")
        axes.plot(summary.student.mean, place, "|", markersize=16, color="black")
    axes.set_yticks(range(len(found)), [s.row.title for s in reversed(found.values())])
    axes.set_xlabel(f"student's {metric} accuracy (%)")
    axes.grid(alpha=0.3)
    return figure


def _gap(rows: Sequence[Summary], table: Table) -> Figure:
    """A figure of validation accuracy (above) and gap (below) over epochs."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    accuracy, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for summary in rows:
        colour = _colour(summary, table)
        for network, style in (("student", "-"), ("teacher", "--"), ("static", ":")):
            curve = _mean(summary.records, f"val/{network}_top1")
            if curve is not None:
                label = summary.row.title if network == "student" else None
                accuracy.plot(_epochs(curve), curve, style, color=colour, label=label)
        curve = _mean(summary.records, "val/gap")
        if curve is not None:
            gap.plot(_epochs(curve), curve, color=colour)
    accuracy.set_ylabel("validation accuracy (%)")
    accuracy.set_title(
        "solid: student, dashed: dynamic teacher, dotted: static teacher", fontsize=9
    )
    accuracy.legend(fontsize=8)
    gap.set_ylabel("gap (points)")
    gap.set_xlabel("epoch")
    gap.axhline(0, color="grey", linewidth=0.8)
    for axes in (accuracy, gap):
        axes.grid(alpha=0.3)
    return figure


def _time(rows: Sequence[Summary], table: Table) -> Figure:
    """A figure of the students' validation accuracy over training time on the same hardware."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for summary in rows:
        curve = _mean(summary.records, "val/student_top1")
        if curve is not None and summary.minutes is not None:
            minutes = summary.minutes.mean * _epochs(curve) / len(curve)
            axes.plot(minutes, curve, color=_colour(summary, table), label=summary.row.title)
            axes.plot(minutes[-1], curve[-1], "k.", markersize=4)
    axes.set_xlabel(f"training time (minutes; {rows[0].hardware})")
    axes.set_ylabel("student's validation accuracy (%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _mean(records: Sequence[Record], name: str) -> np.ndarray | None:
    """The mean over seeds of a logged value, for each epoch; None if no run has this value.

    Args:
        records: records of the runs.
        name: name of the value, such as ``val/gap``.
    """
    curves = [record["epochs"][name] for record in records if name in record["epochs"]]
    if not curves:
        return None
    length = min(map(len, curves))
    return np.mean([curve[:length] for curve in curves], axis=0)


def _epochs(curve: np.ndarray) -> np.ndarray:
    return np.arange(1, len(curve) + 1)
