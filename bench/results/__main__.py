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
from pathlib import Path

from bench.results.lock import only_one
from bench.results.queue import train_all
from bench.results.readme import write_pages
from bench.results.records import Records
from bench.results.table import TableError, read_table
from bench.results.train import Trainer
from bench.threads import threads_per_process


def main(arguments: list[str] | None = None) -> int:
    """Train the missing runs, write the page, and return 1 if a run failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, extra = _parse(arguments[:end]), tuple(arguments[end + 1 :])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    failed, code = [], 0
    try:
        for path in options.tables if not options.only_page else ():
            table = read_table(path)
            unknown = [row for row in options.rows or () if row not in table.rows]
            if unknown:
                raise TableError(f"{path} has no row {unknown[0]}; it has {', '.join(table.rows)}.")
            records = Records(table, path.with_suffix(""))
            threads = threads_per_process(options.jobs)
            trainer = Trainer(records, options.data_root, extra, threads)
            with only_one(table):
                failed += train_all(
                    records, trainer.train, options.jobs, options.rows, stop=trainer.stop
                )
        write_pages(Path())
    except TableError as error:
        print(f"bench.results: error: {error}", file=sys.stderr)
        code = 2
    for sentence in failed:
        print(sentence, file=sys.stderr)
    return code or int(bool(failed))


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
