"""Sentences about the rows of a table, for the page of results and the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.results.conclusions import Conclusion
from bench.results.summary import Summary, compared_by_epoch
from bench.results.table import Table


def of_gap(table: Table, found: Mapping[str, Summary]) -> str:
    """A description of the figure over epochs."""
    rows = compared_by_epoch(table, found)
    kinds = "student (solid) and dynamic teacher (dashed)"
    return f"Validation accuracy of {kinds}, and the gap, over epochs: {titles_of(rows)}"


def titles_of(rows: Iterable[Summary]) -> str:
    """The titles of rows, separated by semicolons."""
    return "; ".join(summary.row.title for summary in rows)


def untrained(table: Table, keys: Iterable[str], found: Mapping[str, Summary]) -> list[str]:
    """Lines with a sentence that names the rows without records; empty if there are none."""
    titles = [table.rows[key].title for key in keys if key not in found]
    return ["", f"Still to be trained: {'; '.join(titles)}."] if titles else []


def verdicts(found: Mapping[str, Summary]) -> list[str]:
    """Lines that say which rows are ahead or behind, as far as the intervals of the gains tell."""
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
            verdict = "Behind the row compared with (its whole interval is below 0)"
        else:
            verdict = "Not told apart from the row compared with (the interval holds 0)"
        titles.setdefault(verdict, []).append(summary.row.title)
    if not titles:
        return []
    return ["", *(f"- {verdict}: {'; '.join(rows)}." for verdict, rows in titles.items())]


def hardware(rows: Iterable[Summary]) -> list[str]:
    """Lines that say on which hardware times were measured, and of which rows no time is known."""
    by_hardware: dict[str, list[str]] = {}
    unknown: list[str] = []
    for summary in rows:
        title = summary.row.title
        if summary.hardware is None:
            unknown.append(title)
        else:
            by_hardware.setdefault(summary.hardware, []).append(title)
    parts = [
        name if len(by_hardware) == 1 else f"{name} ({'; '.join(titles)})"
        for name, titles in by_hardware.items()
    ]
    sentences = []
    if parts:
        sentences.append(f"Minutes were measured on: {', '.join(parts)}.")
    if len(by_hardware) > 1:
        sentences.append(
            "A ratio of times is that of those runs of both rows that were on the same hardware."
        )
    if unknown:
        sentences.append(f"No time is known of: {'; '.join(unknown)}.")
    return ["", " ".join(sentences)]


def advice(table: Table, found: Mapping[str, Summary]) -> list[str]:
    """Lines that say when to use the method, by topic, and which topics have not been measured."""
    said = {c.topic: say(c, table, found) for c in table.conclusions if c.topic is not None}
    lines = [f"- **If {topic}**: {text}" for topic, text in said.items() if text is not None]
    unknown = [topic for topic, text in said.items() if text is None]
    if unknown:
        lines.append(
            f"- **Not measured yet**, so that no advice is given if: {'; '.join(unknown)}."
        )
    return ["", "What this one setting says:", "", *lines] if lines else []


def say(conclusion: Conclusion, table: Table, found: Mapping[str, Summary]) -> str | None:
    """The sentence of a conclusion; None if it cannot be drawn yet.

    All rows that the conclusion names, and the rows that these are compared with, have to be
    complete.
    """
    rows = [table.rows[key] for key in conclusion.rows()]
    needed = {row.key for row in rows} | {row.versus for row in rows if row.versus is not None}
    if not all(key in found and found[key].complete for key in needed):
        return None
    return conclusion.say(found)
