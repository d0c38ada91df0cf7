"""Cells of the tables of results."""

from __future__ import annotations

from bench.results.summary import Summary
from bench.results.table import Table


def against(summary: Summary, table: Table) -> str:
    """The title of the row that a row is compared with."""
    return "" if summary.row.versus is None else table.rows[summary.row.versus].title


def time(summary: Summary) -> str:
    """Minutes, and how many times those of the row compared with."""
    minutes = "" if summary.minutes is None else f"{summary.minutes.mean:.1f}"
    return minutes + ("" if summary.time is None else f" ({summary.time:.1f} x)")


def seeds(summary: Summary) -> str:
    """How many seeds have been trained, and of how many."""
    trained = len(summary.records)
    return str(trained) if summary.complete else f"{trained} of {summary.wanted}"


def text_of(value: object) -> str:
    """A value as a cell, empty for None."""
    return "" if value is None else str(value)
