"""The tables of a report: results, differing settings and confused classes; and its scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from gpd_cli.report.predictions import Predictions, worst_confusions
from gpd_cli.report.run import Run, differing_settings

_NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        header: titles of the columns.
        rows: cells of each row; the first cell is the name of the row.
    """

    header: list[str]
    rows: list[list[str]] = field(default_factory=list)


def results(runs: Sequence[Run]) -> Table:
    """A table of each run's accuracies in percent, and its gap, in the best epoch."""
    columns = {
        "student": "student_top1",
        "teacher": "teacher_top1",
        "static teacher": "static_top1",
        "gap": "gap",
    }
    table = Table(["run", "best epoch", *columns, "images/s"])
    for run in runs:
        best = run.best_epoch
        # For a run without validation: the training accuracies of the last epoch.
        stage, epoch = ("val", best) if best is not None else ("train", max(run.epochs))
        values = run.epochs[epoch]
        speeds = [row["images_per_second"] for row in run.steps if "images_per_second" in row]
        of = f"{epoch} of {max(run.epochs)}" if best is not None else f"{epoch} (training)"
        table.rows.append(
            [
                run.name,
                of,
                *(_number(values.get(f"{stage}/{name}")) for name in columns.values()),
                f"{statistics.median(speeds):,.0f}" if speeds else _NONE,
            ]
        )
    known = [any(row[k] != _NONE for row in table.rows) for k in range(len(table.header))]
    rows = [list(compress(row, known)) for row in table.rows]
    return Table(list(compress(table.header, known)), rows)


def caption(runs: Sequence[Run]) -> str:
    """Explain the numbers in the table of `results`.

    Args:
        runs: the runs in the table.
    """
    scored = [run.best_epoch is not None for run in runs]
    images = "on validation images in the epoch that is best for the student"
    if not any(scored):
        images = "on training images in the last epoch, without validation"
    elif not all(scored):
        images += ", or on training images in the last epoch of a run without validation"
    return (
        f"Top-1 accuracy in percent {images}; the gap is the dynamic teacher's accuracy minus the "
        "student's, in points."
    )


def settings(runs: Sequence[Run]) -> Table:
    """A table of the settings that differ between runs; for a single run, all settings."""
    if len(runs) == 1:
        found = [[name, said(value)] for name, value in runs[0].settings.items()]
        return Table(["setting", "value"], [row for row in found if row[1] != _NONE])
    rows = [[name, *map(said, values)] for name, values in differing_settings(runs).items()]
    return Table(["setting", *(run.name for run in runs)], rows)


def confusions(predictions: Predictions) -> Table:
    """A table of the pairs of classes that the student confuses most often.

    If there is a dynamic teacher, the table also says how often the teacher confuses them.
    """
    names, labels, chosen = predictions.class_names, predictions.labels, predictions.chosen
    teacher = ["teacher too"] if "teacher" in chosen else []
    table = Table(["class", "taken for", "images", "share", *teacher])
    for pair in worst_confusions(labels, chosen["student"]):
        row = [names[pair.label], names[pair.chosen], str(pair.count), f"{pair.share:.0%}"]
        if "teacher" in chosen:
            same = (labels == pair.label) & (chosen["teacher"] == pair.chosen)
            row.append(str(int(same.sum())))
        table.rows.append(row)
    return table


def scores(predictions: Predictions) -> str:
    """A sentence with the accuracies and the gap on the images of the predictions."""
    student = predictions.accuracy("student")
    parts = [f"Student {student:.2f} %"]
    if "teacher" in predictions.chosen:
        teacher = predictions.accuracy("teacher")
        parts += [f"dynamic teacher {teacher:.2f} %", f"gap {teacher - student:.2f} points"]
    count = len(predictions.labels)
    return f"{', '.join(parts)}, on {count:,} {predictions.split} images."


def said(value: Any) -> str:
    """The value of a setting as text, as in a configuration; a hyphen for None."""
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(said, value))}]"
    return str(value)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"
