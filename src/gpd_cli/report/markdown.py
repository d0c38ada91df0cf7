"""The report as Markdown, for a pull request or a wiki."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gpd_cli.files import atomic_path
from gpd_cli.report.predictions import Predictions
from gpd_cli.report.run import Run
from gpd_cli.report.summary import CAPTION, Table, confusions, results, scores, settings


def write_markdown(
    runs: Sequence[Run], predictions: Mapping[str, Predictions], path: Path, picture: str
) -> None:
    """Write results, the picture, settings that differ, scores and confused classes.

    Args:
        runs: the runs to show, at least one.
        predictions: predictions of the run's networks, by name of the run.
        path: the file to write.
        picture: the picture's path as seen from there.
    """
    parts = ["# " + ", ".join(run.name for run in runs)]
    parts += [_table(results(runs)), CAPTION]
    parts += [f"![accuracy, gap, loss and learning rate]({picture})"]
    if len(runs) > 1:
        parts += ["## Settings that differ", _table(settings(runs))]
    for name, found in predictions.items():
        parts += [f"## What {name} sees in the {found.split} images", scores(found)]
        table = confusions(found)
        if table.rows:
            parts += ["Classes that the student confuses most often:", _table(table)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")


def _table(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
