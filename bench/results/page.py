"""The page of results, which is made from the records only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.markdown import table_lines
from bench.results.cells import against, seeds, text_of, time
from bench.results.records import Records
from bench.results.sentences import hardware, of_gap, say, titles_of, untrained, verdicts
from bench.results.summary import (
    Summary,
    compared_by_epoch,
    compared_by_time,
    summarize,
    tuning_scores,
)
from bench.results.table import Table, read_table


def all_records(root: Path) -> list[Records]:
    """All tables of a checkout with their records, in the order of the tables' names.

    Args:
        root: folder of the checkout.
    """
    tables = sorted((root / "results").glob("*.yaml"))
    return [Records(read_table(path), path.with_suffix("")) for path in tables]


def render_page(everything: Iterable[Records]) -> str:
    """The text of the page, with a section for each table.

    Args:
        everything: the records of all tables.

    Returns:
        Markdown.
    """
    lines = [
        "# Results",
        "",
        "This page is made by `python -m bench.results` of the tables in the folder `results` and "
        "the records beside them: every number is computed from the records, and each record "
        "holds the command of its run.",
        "",
        "- student, teacher: accuracy (top-1, %) on the test images of the checkpoint that was "
        "best on held-out training images, tested once; in a table of settings, among which one "
        "chooses, on the held-out images themselves. Mean ± standard deviation over seeds;",
        "- gain: the student's accuracy minus that of the row it is compared with, in points: the "
        "mean over the seeds that both rows have, and in parentheses its 95 % t interval, or the "
        "number of these seeds where they are fewer than three. The interval allows for the seed "
        "alone, not for the choice of test images (on 10,000 of them, an accuracy of 40 % has a "
        "standard error of 0.5 points), and of twenty intervals one misses on average;",
        "- gain on validation: beside a gain on test images, that on the held-out training images, "
        "each student at its best epoch;",
        "- gap: the dynamic teacher's accuracy minus the student's, of the checkpoint that was "
        "best for the student, not for the teacher;",
        "- time: of one training, in minutes (of the processor on a CPU, of the clock on a GPU; "
        "runs side by side slow each other down), and relative to the row it is compared with: the "
        "ratio of the two rows' mean times, over the runs of each row that were on hardware common "
        "to both, possibly one run of each; empty where it is not known: the time of a run that "
        "was killed once is lost. What comes before a run is not counted: the training of a static "
        "teacher, or of the student that a row starts from;",
        "- lr: the learning rate of the row's grid with the best validation accuracy in short runs "
        "of one seed, listed below the table; it need not be the best for longer runs. "
        "A row without such runs takes the rate of another one, which is named, or has only one "
        "rate to try.",
    ]
    for records in everything:
        lines += _section(records)
    return "\n".join(lines) + "\n"


def _section(records: Records) -> list[str]:
    table, found = records.table, summarize(records)
    lines = ["", f"## {table.title}", "", table.about]
    if not found:
        titles = "; ".join(row.title for row in table.rows.values())
        return [*lines, "", f"Nothing has been trained yet. The rows are: {titles}."]
    cells = [_cells(s, table) for s in found.values()]
    lines += ["", *table_lines(list(cells[0]), [list(row.values()) for row in cells])]
    lines += untrained(table, table.rows, found)
    lines += hardware(found.values())
    scores = f"{table.metric.capitalize()} accuracy of students, each seed a point"
    lines += ["", f"![{scores}](results/{table.name}_accuracy.png)"]
    if compared_by_epoch(table, found):
        lines += ["", f"![{of_gap(table, found)}](results/{table.name}_gap.png)"]
    if timed := compared_by_time(table, found):
        text = f"Validation accuracy over training time, means over seeds: {titles_of(timed)}"
        lines += ["", f"![{text}](results/{table.name}_time.png)"]
    lines += ["", *_rates(records, found)]
    said = [text for conclusion in table.conclusions if (text := say(conclusion, table, found))]
    compared = verdicts(found)
    if compared or said:
        lines += ["", "What this says:"]
    lines += compared
    if said:
        lines += ["", *(f"{number}. {text}" for number, text in enumerate(said, 1))]
    return lines


def _cells(summary: Summary, table: Table) -> dict[str, str]:
    """The cells of a row, by the titles of their columns."""
    tested = table.metric == "test"
    return {
        "row": summary.row.title,
        f"student, {table.metric}": str(summary.student),
        "against": against(summary, table),
        "gain": text_of(summary.gain),
        **({"gain on validation": text_of(summary.validation_gain)} if tested else {}),
        f"teacher, {table.metric}": text_of(summary.teacher),
        "gap": text_of(summary.gap),
        "epochs": str(summary.epochs),
        "time": time(summary),
        "lr": _rate(summary, table),
        "seeds": seeds(summary),
    }


def _rate(summary: Summary, table: Table) -> str:
    tuned = summary.row.tuned_as
    return f"{summary.rate:g}" + ("" if tuned is None else f" (of: {table.rows[tuned].title})")


def _rates(records: Records, found: Mapping[str, Summary]) -> list[str]:
    """Lines on the choice of learning rates: a table of validation accuracies, the best in bold."""
    rows = []
    scores = tuning_scores(records)
    rates = sorted({rate for by_rate in scores.values() for rate in by_rate})
    for key, by_rate in scores.items():
        chosen = records.rate(records.table.rows[key])  # of equally good rates, the first
        cells = [_score(by_rate.get(rate), rate == chosen) for rate in rates]
        rows.append([records.table.rows[key].title, *cells])
    if not rows:
        return []
    further = [
        f"{row.title} ({', '.join(_options(row.tuning))})"
        for row in (records.table.rows[key] for key in scores)
        if row.tuning
    ]
    edges = [
        records.table.rows[key].title
        for key, by_rate in scores.items()
        if records.rate(records.table.rows[key]) in (min(by_rate), max(by_rate))
    ]
    tuning = records.table.tuning
    runs = ", ".join([f"seed {tuning.seed}", *_options(tuning.settings)])
    lines = [
        f"Learning rates ({runs}): the student's validation accuracy, %.",
        "",
        *table_lines(["row", *(f"{rate:g}" for rate in rates)], rows),
    ]
    if further:
        lines += ["", f"Tuned with further options: {'; '.join(further)}."]
    if edges:
        beyond = "Best at the edge of the grid, so that a better rate may lie beyond"
        lines += ["", f"{beyond}: {'; '.join(edges)}."]
    return lines


def _options(settings: Mapping[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, value in settings.items()]


def _score(value: float | None, is_chosen: bool) -> str:
    if value is None:
        return ""
    if value == -math.inf:
        return "diverged"
    return f"**{value:.2f}**" if is_chosen else f"{value:.2f}"
