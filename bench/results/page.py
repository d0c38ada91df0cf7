"""The page of results and the README's table, made from the records only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.results.reading import Reading
from bench.results.records import Records
from bench.results.summary import (
    Summary,
    compared_by_epoch,
    compared_by_time,
    summarize,
    tuning_scores,
)
from bench.results.table import Table, read_table

MARKS = ("<!-- results: python -m bench.results -->", "<!-- end of results -->")
"""The lines before and after the README's table."""

FIGURE_MARKS = ("<!-- figure: python -m bench.results -->", "<!-- end of figure -->")
"""The lines before and after the picture of the README and of the first page of the manual."""


def all_records(root: Path) -> list[Records]:
    """The tables of a checkout, in the order of their names, with their records.

    Args:
        root: folder of the checkout.
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
        "runs side by side slow each other down), and relative to the row it is compared with "
        "where both were trained on the same hardware; empty where it is not known: the time of "
        "a run that was killed once is lost. What comes before a run is not counted: the training "
        "of a static teacher, or of the student that a row starts from;",
        "- lr: the learning rate of the row's grid with the best validation accuracy in short runs "
        "of one seed, listed below the table; it need not be the best for longer runs. "
        "A row without such runs takes the rate of another one, which is named.",
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
                [
                    s.row.title,
                    str(s.student),
                    _against(s, records.table),
                    _text(s.gain),
                    _time(s),
                    _seeds(s),
                ]
                for s in rows
            ]
            head = (
                "row",
                f"{records.table.metric} accuracy, %",
                "against",
                "gain",
                "minutes",
                "seeds",
            )
            text = (
                f"{records.table.title} (accuracy: mean ± standard deviation over seeds; gain: in "
                "points, with its 95 % interval over seeds):"
            )
            lines = [text, "", *_markdown(head, cells)]
            lines += _untrained(records.table, records.table.headline, found)
            lines += _hardware(rows)
            lines += _advice(records.table, found)
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def render_figure(everything: Iterable[Records], folder: str, width: int) -> str:
    """The picture of the README and of the manual's first page.

    Args:
        everything: the records of all tables.
        folder: the folder of the manual's pages, as seen from the page; with a slash, or empty.
        width: width of the picture, in pixels.

    Returns:
        HTML with a text that names what is drawn: the figure over epochs of the first table with
        headline rows; empty where none of these has been trained.
    """
    for records in everything:
        found = summarize(records)
        if any(key in found for key in records.table.headline):
            text = _of_gap(records.table, found)
            source = f"{folder}results/{records.table.name}_gap.png"
            return f'<img src="{source}" width="{width}"\n     alt="{text}">'
    return ""


def with_part(page: str, marks: tuple[str, str], content: str) -> str:
    """A page with what lies between two marks replaced.

    Args:
        page: text of the page, with the marks.
        marks: the lines before and after the part.
        content: the new part.
    """
    start, end = marks
    pattern = re.escape(start) + ".*?" + re.escape(end)
    text = f"{start}\n{content}\n{end}"
    return re.sub(pattern, lambda _: text, page, flags=re.DOTALL)


def made_pages(root: Path) -> dict[Path, str]:
    """The pages that are made of the records, as they should be.

    Args:
        root: folder of the checkout.

    Returns:
        Texts by path: the page of results, the README, and the first page of the manual.
    """
    everything = all_records(root)
    readme, index = root / "README.md", root / "docs" / "index.md"
    text = with_part(readme.read_text(), MARKS, render_headline(everything))
    return {
        root / "docs" / "results.md": render_page(everything),
        readme: with_part(text, FIGURE_MARKS, render_figure(everything, "docs/", width=480)),
        index: with_part(index.read_text(), FIGURE_MARKS, render_figure(everything, "", width=640)),
    }


def write_pages(root: Path) -> None:
    """Write ``docs/results.md``, its figures, and their parts of README and first page.

    Args:
        root: folder of the checkout.
    """
    from bench.results.figures import draw_figures  # imported here: matplotlib is slow to import

    for path, text in made_pages(root).items():
        path.write_text(text)
    for records in all_records(root):
        draw_figures(records, summarize(records), root / "docs" / "results")


def _section(records: Records) -> list[str]:
    table, found = records.table, summarize(records)
    lines = ["", f"## {table.title}", "", table.about]
    if not found:
        return [*lines, "", "Nothing has been trained yet."]
    cells = [_cells(s, table) for s in found.values()]
    lines += ["", *_markdown(list(cells[0]), [list(row.values()) for row in cells])]
    lines += _untrained(table, table.rows, found)
    lines += _hardware(found.values())
    scores = f"{table.metric.capitalize()} accuracy of students, each seed a point"
    lines += ["", f"![{scores}](results/{table.name}_accuracy.png)"]
    lines += ["", f"![{_of_gap(table, found)}](results/{table.name}_gap.png)"]
    if timed := compared_by_time(table, found):
        text = f"Validation accuracy over training time, means over seeds: {_titles(timed)}"
        lines += ["", f"![{text}](results/{table.name}_time.png)"]
    lines += ["", *_rates(records, found)]
    said = [text for reading in table.reading if (text := _say(reading, table, found))]
    verdicts = _verdicts(found)
    if verdicts or said:
        lines += ["", "What this says:"]
    lines += verdicts
    if said:
        lines += ["", *(f"{number}. {text}" for number, text in enumerate(said, 1))]
    return lines


def _of_gap(table: Table, found: Mapping[str, Summary]) -> str:
    """What the figure over epochs shows."""
    rows = compared_by_epoch(table, found)
    kinds = "student (solid) and dynamic teacher (dashed)"
    return f"Validation accuracy of {kinds}, and the gap, over epochs: {_titles(rows)}"


def _titles(rows: Iterable[Summary]) -> str:
    return "; ".join(summary.row.title for summary in rows)


def _untrained(table: Table, keys: Iterable[str], found: Mapping[str, Summary]) -> list[str]:
    """A sentence that names the rows without records, if there are any."""
    titles = [table.rows[key].title for key in keys if key not in found]
    return ["", f"Still to be trained: {'; '.join(titles)}."] if titles else []


def _verdicts(found: Mapping[str, Summary]) -> list[str]:
    """What the intervals of the gains allow to say of the rows."""
    titles: dict[str, list[str]] = {}
    for summary in found.values():
        gain = summary.gain
        if gain is None:
            continue
        if gain.low is None or gain.high is None:
            verdict = "Fewer than three seeds in common with the row compared with, so no verdict"
        elif gain.low > 0:
            verdict = "Ahead of the row compared with (its whole interval is above 0)"
        elif gain.high < 0:
            verdict = "Behind it (its whole interval is below 0)"
        else:
            verdict = "Not told apart from it by these seeds (the interval holds 0)"
        titles.setdefault(verdict, []).append(summary.row.title)
    if not titles:
        return []
    return ["", *(f"- {verdict}: {'; '.join(rows)}." for verdict, rows in titles.items())]


def _hardware(rows: Iterable[Summary]) -> list[str]:
    """A sentence on what the times were taken on, and one on the rows without a time."""
    by_hardware: dict[str, list[str]] = {}
    unknown: list[str] = []
    for summary in rows:
        titles = (
            unknown if summary.hardware is None else by_hardware.setdefault(summary.hardware, [])
        )
        titles.append(summary.row.title)
    parts = [
        name if len(by_hardware) == 1 else f"{name} ({'; '.join(titles)})"
        for name, titles in by_hardware.items()
    ]
    sentences = [f"Times are those of: {', '.join(parts)}."] if parts else []
    sentences += (
        [f"No time is known, since runs were killed, of: {'; '.join(unknown)}."] if unknown else []
    )
    return ["", " ".join(sentences)]


def _advice(table: Table, found: Mapping[str, Summary]) -> list[str]:
    """When to use the method, by topic, and the topics on which there are no records yet."""
    said = {r.topic: _say(r, table, found) for r in table.reading if r.topic is not None}
    lines = [f"- **If {topic}**: {text}" for topic, text in said.items() if text is not None]
    unknown = [topic for topic, text in said.items() if text is None]
    if unknown:
        lines.append(
            f"- **Not measured yet**, so that no advice is given if: {'; '.join(unknown)}."
        )
    return ["", "What this one setting says:", "", *lines] if lines else []


def _say(reading: Reading, table: Table, found: Mapping[str, Summary]) -> str | None:
    """A conclusion; None before its rows, and those they are compared with, are complete."""
    rows = [table.rows[key] for key in reading.rows()]
    needed = {row.key for row in rows} | {row.versus for row in rows if row.versus is not None}
    if not all(key in found and found[key].complete for key in needed):
        return None
    return reading.say(found)


def _cells(summary: Summary, table: Table) -> dict[str, str]:
    """The cells of a row by the heads of their columns."""
    tested = table.metric == "test"
    return {
        "row": summary.row.title,
        f"student, {table.metric}": str(summary.student),
        "against": _against(summary, table),
        "gain": _text(summary.gain),
        **({"gain on validation": _text(summary.validation_gain)} if tested else {}),
        f"teacher, {table.metric}": _text(summary.teacher),
        "gap": _text(summary.gap),
        "epochs": str(summary.epochs),
        "time": _time(summary),
        "lr": _rate(summary, table),
        "seeds": _seeds(summary),
    }


def _against(summary: Summary, table: Table) -> str:
    return "" if summary.row.versus is None else table.rows[summary.row.versus].title


def _rate(summary: Summary, table: Table) -> str:
    tuned = summary.row.tuned_as
    return f"{summary.rate:g}" + ("" if tuned is None else f" (of: {table.rows[tuned].title})")


def _time(summary: Summary) -> str:
    minutes = "" if summary.minutes is None else f"{summary.minutes.mean:.1f}"
    return minutes + ("" if summary.time is None else f" ({summary.time:.1f} x)")


def _seeds(summary: Summary) -> str:
    trained = len(summary.records)
    return str(trained) if summary.complete else f"{trained} of {summary.wanted}"


def _rates(records: Records, found: Mapping[str, Summary]) -> list[str]:
    """The choice of learning rates: validation accuracies, the best one in bold type."""
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
    edges = [
        records.table.rows[key].title
        for key, by_rate in scores.items()
        if max(by_rate, key=lambda rate: by_rate[rate]) in (min(by_rate), max(by_rate))
    ]
    lines = [
        f"Learning rates (seed {records.table.tuning.seed}{options}): the student's validation "
        "accuracy, %.",
        "",
        *_markdown(["row", *(f"{rate:g}" for rate in rates)], rows),
    ]
    if edges:
        beyond = "Best at the edge of the grid, so that a better rate may lie beyond"
        lines += ["", f"{beyond}: {'; '.join(edges)}."]
    return lines


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
