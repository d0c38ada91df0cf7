"""Writing of all pages that are made from the records, and of parts of README and manual."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bench.markdown import table_lines
from bench.results.cells import against, seeds, text_of, time
from bench.results.page import all_records, render_page
from bench.results.records import Records, write_text
from bench.results.sentences import advice, hardware, of_gap, untrained
from bench.results.summary import summarize

MARKS = ("<!-- results: python -m bench.results -->", "<!-- end of results -->")
"""The lines before and after the results in the README."""

FIGURE_MARKS = ("<!-- figure: python -m bench.results -->", "<!-- end of figure -->")
"""The lines before and after the picture in the README and on the first page of the manual."""


def render_headline(everything: Iterable[Records]) -> str:
    """The results that the README shows: the headline rows that have been trained.

    Args:
        everything: the records of all tables.

    Returns:
        Markdown, with a table for each table of runs that has headline rows.
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
                    against(s, records.table),
                    text_of(s.gain),
                    time(s),
                    seeds(s),
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
            lines = [text, "", *table_lines(head, cells)]
            lines += untrained(records.table, records.table.headline, found)
            lines += hardware(rows)
            lines += advice(records.table, found)
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def render_figure(everything: Iterable[Records], folder: str, width: int) -> str:
    """The picture in the README and on the manual's first page.

    It is the figure over epochs of the first table with headline rows that have been trained.

    Args:
        everything: the records of all tables.
        folder: path of the folder of the manual's pages relative to the page, with a slash at its
            end; empty if the page is in this folder.
        width: width of the picture in pixels.

    Returns:
        HTML with an alternative text that says what is drawn; empty if there is no such table.
    """
    for records in everything:
        found = summarize(records)
        if any(key in found for key in records.table.headline):
            text = of_gap(records.table, found)
            source = f"{folder}results/{records.table.name}_gap.png"
            return f'<img src="{source}" width="{width}"\n     alt="{text}">'
    return ""


def replaced_between(page: str, marks: tuple[str, str], content: str) -> str:
    """Replace the text of a page that lies between two marks.

    Args:
        page: text of the page.
        marks: the lines before and after this text; both are kept.
        content: the new text.
    """
    start, end = marks
    pattern = re.escape(start) + ".*?" + re.escape(end)
    text = f"{start}\n{content}\n{end}"
    return re.sub(pattern, lambda _: text, page, flags=re.DOTALL)


def made_pages(root: Path) -> dict[Path, str]:
    """The present texts of all pages that are made from the records.

    Args:
        root: folder of the checkout.

    Returns:
        Texts by path: the page of results, the README, and the first page of the manual.
    """
    everything = all_records(root)
    readme, index = root / "README.md", root / "docs" / "index.md"
    text = replaced_between(readme.read_text(encoding="utf-8"), MARKS, render_headline(everything))
    first = index.read_text(encoding="utf-8")
    return {
        root / "docs" / "results.md": render_page(everything),
        readme: replaced_between(text, FIGURE_MARKS, render_figure(everything, "docs/", width=480)),
        index: replaced_between(first, FIGURE_MARKS, render_figure(everything, "", width=640)),
    }


def write_pages(root: Path) -> None:
    """Write ``docs/results.md`` and its figures, and update README and the manual's first page.

    Args:
        root: folder of the checkout.
    """
    from bench.results.figures import draw_figures  # imported here: matplotlib is slow to import

    for path, text in made_pages(root).items():
        write_text(path, text)
    for records in all_records(root):
        draw_figures(records, summarize(records), root / "docs" / "results")
