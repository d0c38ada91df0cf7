"""Train the missing runs of a table, and write the page of results.

python -m bench.results TABLE [TABLE ...] [--jobs N] [--data-root DATA] [--rows ROW ...]
                        [--only-page] [-- OPTION ...]

A TABLE is a file such as results/cifar100_16px.yaml; results/README.md explains its entries. Each
run is one ``gpd fit`` in its own process. The command may be stopped, or killed, at any time; the
same command then continues. An OPTION is a setting for this machine, such as --trainer.accelerator
gpu: every ``gpd fit`` and ``gpd test`` gets the option, but the commands in the records do not have
it. Run the command in the folder of the checkout; it writes docs/results.md, docs/index.md and
README.md there. Checkpoints and logs are in runs/results.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Collection
from pathlib import Path

from bench.results.lock import only_one
from bench.results.queue import train_all
from bench.results.readme import write_pages
from bench.results.records import Records
from bench.results.table import TableError, read_table
from bench.results.train import Trainer
from bench.threads import threads_per_process


def main(arguments: list[str] | None = None) -> int:
    """Train the missing runs, write the page, and return 1 if a run failed, 2 after a mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, extra = _parse(arguments[:end]), tuple(arguments[end + 1 :])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        # All tables are read before a run of any of them is trained, which may take days.
        tables = [] if options.only_page else [_read(p, options.rows) for p in options.tables]
    except TableError as error:
        print(f"bench.results: error: {error}", file=sys.stderr)
        return 2
    failed: list[str] = []
    refused: list[str] = []
    for records in tables:
        trainer = Trainer(records, options.data_root, extra, threads_per_process(options.jobs))
        try:
            with only_one(records.table):
                failed += train_all(
                    records, trainer.train, options.jobs, options.rows, stop=trainer.stop
                )
        except TableError as error:
            refused.append(str(error))
    try:
        write_pages(Path())
    except TableError as error:
        refused.append(str(error))
    for sentence in dict.fromkeys(refused):  # the same mistake may stop the page as well
        print(f"bench.results: error: {sentence}", file=sys.stderr)
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return 2 if refused else int(bool(failed))


def _read(path: Path, rows: Collection[str] | None) -> Records:
    """Read a table, of which some rows are to be trained.

    Raises:
        TableError: when the table cannot be used, or lacks one of the rows.
    """
    table = read_table(path)
    for row in rows or ():
        if row not in table.rows:
            raise TableError(f"{path} has no row {row}; it has {', '.join(table.rows)}.")
    return Records(table, path.with_suffix(""))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", type=Path, metavar="TABLE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--data-root", help="folder of the data, as --data.root of gpd fit")
    parser.add_argument("--rows", nargs="+", help="rows to train; by default all")
    parser.add_argument("--only-page", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    if not options.tables and not options.only_page:
        parser.error("no TABLE is given (before --rows); --only-page writes the page alone.")
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; at least one run has to be trained at a time.")
    return options


if __name__ == "__main__":
    # On SIGTERM, as on Ctrl-C, the command ends its processes as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
