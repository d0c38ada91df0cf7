"""Texts of the cells in the tables of results."""

from __future__ import annotations

from bench.results.summary import Summary
from bench.results.table import Table


def against(summary: Summary, table: Table) -> str:
    """The title of the row that a row is compared with; empty if there is none."""
    return "" if summary.row.versus is None else table.rows[summary.row.versus].title


def time(summary: Summary) -> str:
    """Minutes of training, and their ratio to those of the row that this row is compared with."""
    minutes = "" if summary.minutes is None else f"{summary.minutes.mean:.1f}"
    return minutes + ("" if summary.time is None else f" ({summary.time:.1f} x)")


def seeds(summary: Summary) -> str:
    """The number of seeds that have been trained, and of all seeds if some are missing."""
    trained = len(summary.records)
    return str(trained) if summary.complete else f"{trained} of {summary.wanted}"


def text_of(value: object) -> str:
    """A value as text; empty for None."""
    return "" if value is None else str(value)
