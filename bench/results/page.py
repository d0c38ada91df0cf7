"""The page of results and the README's table, made of records alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.results.records import Records
from bench.results.summary import Summary, summarize, tuning_scores
from bench.results.table import Table, read_table

MARKS = ("<!-- results: python -m bench.results -->", "<!-- end of results -->")
"""What the README's table stands between."""

_HEAD = ("row", "student", "against", "gain", "teacher", "gap", "epochs", "time", "lr", "seeds")


def all_records(root: Path) -> list[Records]:
    """The tables of a checkout, in the order of their names, with their records.

    Args:
        root: of the checkout.
    """
    tables = sorted((root / "results").glob("*.yaml"))
    return [Records(read_table(path), path.with_suffix("")) for path in tables]


def render_page(everything: Iterable[Records]) -> str:
    """The page: a section for each table.

    Args:
        everything: the records of all tables.

    Returns:
        Markdown.
    """
    lines = [
        "# Results",
        "",
        "This page is made by `python -m bench.results` of the [tables](../results) and the "
        "records beside them: every number is computed from the records, and each record holds "
        "the command of its run.",
        "",
        "- student, teacher: test accuracy (top-1, %) of the checkpoint that was best on held-out "
        "training images: mean and standard deviation over seeds; tested once;",
        "- gain: the student's mean minus that of the row it is compared with, in points, and the "
        "standard error of that difference;",
        "- gap: the dynamic teacher's accuracy minus the student's;",
        "- time: of one training, in minutes (seconds of the processor on a CPU, of the clock on a "
        "GPU), and relative to the row it is compared with;",
        "- lr: the learning rate, chosen for each row from the same grid by validation accuracy.",
    ]
    for records in everything:
        lines += _section(records)
    return "\n".join(lines) + "\n"


def render_headline(everything: Iterable[Records]) -> str:
    """The rows that the README shows, as far as they have been trained.

    Args:
        everything: the records of all tables.

    Returns:
        Markdown, a table for each table with headline rows.
    """
    parts = []
    for records in everything:
        found = summarize(records)
        rows = [found[key] for key in records.table.headline if key in found]
        if rows:
            cells = [
                (s.row.title, str(s.student), _text(s.gain), f"{s.minutes.mean:.0f} min")
                for s in rows
            ]
            head = ("test accuracy of the student, %", "accuracy", "gain", "time")
            parts.append(f"{records.table.title}:\n\n" + "\n".join(_markdown(head, cells)))
    return "\n\n".join(parts)


def with_headline(readme: str, headline: str) -> str:
    """The README with its table of results replaced.

    Args:
        readme: its text, with `MARKS`.
        headline: the new table.
    """
    start, end = MARKS
    pattern = re.escape(start) + ".*?" + re.escape(end)
    text = f"{start}\n{headline}\n{end}"
    return re.sub(pattern, lambda _: text, readme, flags=re.DOTALL)


def write_pages(root: Path) -> None:
    """Write ``docs/results.md``, its figures, and the README's table.

    Args:
        root: of the checkout.
    """
    from bench.results.figures import draw_figures  # matplotlib takes its time

    everything = all_records(root)
    (root / "docs" / "results.md").write_text(render_page(everything))
    for records in everything:
        draw_figures(records, summarize(records), root / "docs" / "results")
    readme = root / "README.md"
    readme.write_text(with_headline(readme.read_text(), render_headline(everything)))


def _section(records: Records) -> list[str]:
    table, found = records.table, summarize(records)
    lines = ["", f"## {table.title}", "", table.about]
    if not found:
        return [*lines, "", "Nothing has been trained yet."]
    lines += ["", *_markdown(_HEAD, [_cells(s, table) for s in found.values()])]
    untrained = [row.title for key, row in table.rows.items() if key not in found]
    if untrained:
        lines += ["", f"Still to be trained: {'; '.join(untrained)}."]
    for name, text in (
        ("accuracy", "Test accuracy of students, each seed a point"),
        ("gap", "Validation accuracy and gap over epochs, means over seeds"),
        ("time", "Validation accuracy of students over training time, means over seeds"),
    ):
        lines += ["", f"![{text}](results/{table.name}_{name}.png)"]
    lines += ["", *_rates(records, found)]
    said = [text for sentence in table.reading if (text := _fill_in(sentence, found))]
    if said:
        lines += ["", "What this says:", ""]
        lines += [f"{number}. {text}" for number, text in enumerate(said, 1)]
    return lines


def _fill_in(sentence: str, found: Mapping[str, Summary]) -> str | None:
    """A sentence of the reading with its numbers; None while one of its rows is untrained."""
    try:
        return sentence.format(**found)
    except (KeyError, TypeError):  # no such row yet, or None for what it is compared with
        return None


def _cells(summary: Summary, table: Table) -> list[str]:
    versus = "" if summary.row.versus is None else table.rows[summary.row.versus].title
    time = f"{summary.minutes.mean:.1f}"
    if summary.time is not None:
        time += f" ({summary.time:.1f} x)"
    seeds = str(len(summary.records))
    if len(summary.records) < summary.wanted:
        seeds += f" of {summary.wanted}"
    return [
        summary.row.title,
        str(summary.student),
        versus,
        _text(summary.gain),
        _text(summary.teacher),
        _text(summary.gap),
        str(summary.epochs),
        time,
        f"{summary.rate:g}",
        seeds,
    ]


def _rates(records: Records, found: Mapping[str, Summary]) -> list[str]:
    """How the learning rates were chosen: validation accuracies, the best one in bold type."""
    rows = []
    scores = tuning_scores(records)
    rates = sorted({rate for by_rate in scores.values() for rate in by_rate})
    for key, by_rate in scores.items():
        best = max(by_rate.values())
        cells = [_score(by_rate.get(rate), best) for rate in rates]
        rows.append([records.table.rows[key].title, *cells])
    if not rows:
        return []
    options = "".join(f", {k} {v}" for k, v in records.table.tuning.settings.items())
    return [
        f"Learning rates (seed {records.table.tuning.seed}{options}): the student's validation "
        "accuracy, %.",
        "",
        *_markdown(["row", *(f"{rate:g}" for rate in rates)], rows),
    ]


def _score(value: float | None, best: float) -> str:
    if value is None:
        return ""
    return f"**{value:.2f}**" if value == best else f"{value:.2f}"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows)]
