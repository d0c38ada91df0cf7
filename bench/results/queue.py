"""Training of the missing runs of a table, several at the same time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from bench.results.records import Record, Records, Run
from bench.results.table import Row


def missing(records: Records, rows: Collection[str] | None = None) -> Iterator[Run]:
    """The runs that are still to be trained, in the order of the table.

    Args:
        records: the records of the table.
        rows: keys of the rows to train; by default all. Rows that these depend on are included.

    Yields:
        Runs that can be trained now. Their learning rate is known, and if they start or learn from
        extracted students of other rows, those rows have been trained.
    """
    table = records.table
    for row in _wanted(records, rows):
        needs = [table.rows[key] for key in row.files.values()]
        if any(len(records.finished(need)) < len(table.seeds_of(need)) for need in needs):
            continue
        for run in (*records.tuning(row), *records.scored(row)):
            if run.rate is not None and records.read(run) is None:
                yield run


def train_all(
    records: Records,
    train: Callable[[Run], Record],
    jobs: int,
    rows: Collection[str] | None = None,
    stop: Callable[[], None] = lambda: None,
) -> list[str]:
    """Train the missing runs, and write each record as soon as its run has ended.

    Args:
        records: the records to complete.
        train: function that trains a run and returns its record.
        jobs: number of runs that are trained at the same time.
        rows: keys of the rows to train; by default all.
        stop: function that ends the runs under way; called when this process has to end.

    Returns:
        A sentence for each run that failed, and for each row without a usable learning rate.
    """
    failed: dict[Run, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            running: dict[Future[Record], Run] = {}
            while True:
                for run in missing(records, rows):
                    if len(running) == jobs:
                        break
                    if run in failed:
                        continue
                    # A run trains the sources of its student first if this machine lacks them. No
                    # run must be trained twice at a time, so one that needs it as well waits.
                    under_way = {*running.values()}
                    under_way = under_way.union(*map(records.unmade_sources, under_way))
                    if under_way.isdisjoint({run, *records.unmade_sources(run)}):
                        logging.info("%s/%s: learning rate %g", run.row, run.name, run.rate)
                        running[pool.submit(train, run)] = run
                if not running:
                    return [*failed.values(), *_without_rate(records, rows)]
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    run = running.pop(future)
                    if error := future.exception():
                        failed[run] = f"{run.row}/{run.name}: {error}"
                        logging.error(failed[run])
                    else:
                        records.write(run, future.result())
                        logging.info("%s/%s: %s", run.row, run.name, _scores(future.result()))
        except BaseException:
            stop()  # before the pool ends, since it waits for threads that wait for their runs
            raise


def _wanted(records: Records, rows: Collection[str] | None) -> list[Row]:
    """The rows to train, in the order of the table."""
    table = records.table
    keys = table.rows if rows is None else _with_needs(records, rows)
    return [row for key, row in table.rows.items() if key in keys]


def _without_rate(records: Records, rows: Collection[str] | None) -> list[str]:
    """A sentence for each row that diverges at every learning rate that was tried."""
    return [
        f"{row.key}: training diverged at every learning rate of its grid; give smaller ones."
        for row in _wanted(records, rows)
        if records.diverges(row)
    ]


def _with_needs(records: Records, rows: Collection[str]) -> set[str]:
    """Keys of some rows, and of all rows whose learning rates or students these need."""
    found: set[str] = set()
    waiting = list(rows)
    while waiting:
        row = records.table.rows[waiting.pop()]
        if row.key not in found:
            found.add(row.key)
            waiting += [*row.files.values(), *([row.tuned_as] if row.tuned_as else [])]
    return found


def _scores(record: Record) -> str:
    if "diverged" in record:
        return "diverged"
    curves = record["epochs"]
    last = ", ".join(f"{name} {values[-1]:.2f}" for name, values in curves.items() if "val" in name)
    tested = ", ".join(f"{name} {value:.2f}" for name, value in record.get("test", {}).items())
    seconds = "" if record["seconds"] is None else f" ({record['seconds']:.0f} s)"
    return f"{last}{'; test: ' if tested else ''}{tested}{seconds}"
