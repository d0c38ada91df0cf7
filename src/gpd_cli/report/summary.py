"""The tables of a report, as texts: results, settings that differ, confused classes."""

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
    """Titles of columns, and rows of texts; the first column names the row."""

    header: list[str]
    rows: list[list[str]] = field(default_factory=list)


def results(runs: Sequence[Run]) -> Table:
    """What each run reached: accuracies in percent and the gap of its best epoch."""
    scores = {
        "student": "student_top1",
        "teacher": "teacher_top1",
        "static teacher": "static_top1",
        "gap": "gap",
    }
    table = Table(["run", "best epoch", *scores, "images/s"])
    for run in runs:
        best = run.best_epoch
        # Without validation, the last epoch's training.
        stage, epoch = ("val", best) if best is not None else ("train", max(run.epochs))
        values = run.epochs[epoch]
        speeds = [row["images_per_second"] for row in run.steps if "images_per_second" in row]
        of = f"{epoch} of {max(run.epochs)}" if best is not None else f"{epoch} (training)"
        table.rows.append(
            [
                run.name,
                of,
                *(_number(values.get(f"{stage}/{name}")) for name in scores.values()),
                f"{statistics.median(speeds):,.0f}" if speeds else _NONE,
            ]
        )
    known = [any(row[k] != _NONE for row in table.rows) for k in range(len(table.header))]
    rows = [list(compress(row, known)) for row in table.rows]
    return Table(list(compress(table.header, known)), rows)


def settings(runs: Sequence[Run]) -> Table:
    """The settings that differ between runs; of one run, all that are set."""
    if len(runs) == 1:
        found = [[name, said(value)] for name, value in runs[0].settings.items()]
        return Table(["setting", "value"], [row for row in found if row[1] != _NONE])
    rows = [[name, *map(said, values)] for name, values in differing_settings(runs).items()]
    return Table(["setting", *(run.name for run in runs)], rows)


def confusions(predictions: Predictions) -> Table:
    """The pairs of classes that the student confuses most often, and how often the teacher does."""
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


def said(value: Any) -> str:
    """The value of a setting as it is written in a configuration."""
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(said, value))}]"
    return str(value)


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"
