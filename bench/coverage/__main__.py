"""Try to expand every family of timm and every classifier of torchvision; write the table.

python -m bench.coverage [NAME ...] [--jobs 4] [--again failed]

Without names the command continues where it was stopped, from the records in results/coverage. A
NAME is a module of timm (convnext: its smallest network), a network of timm (convnext_atto) or of
torchvision (torchvision/resnet18), or a whole library (timm, torchvision); named networks are tried
again.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.coverage.architectures import (
    Target,
    UnknownNameError,
    all_targets,
    named_targets,
    timm_modules,
    torchvision_names,
)
from bench.coverage.check import Settings, check
from bench.coverage.isolate import Limits, run_isolated
from bench.coverage.table import FAILED, append_result, read_results, render, summary
from bench.threads import threads_per_process

FEWER_BRANCHES = 2
"""Number of branches per kernel, if the teacher with all branches exceeds the memory limit."""


def main(arguments: list[str] | None = None) -> int:
    """Try the missing networks, write the table, and return 1 if a network is broken."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings(options.ratio, options.branches, options.steps)
    versions = {name: version(name).partition("+")[0] for name in ("timm", "torch", "torchvision")}
    key = {"versions": versions, "settings": asdict(settings)}
    cache = options.results.parent / "smallest.json"
    try:
        targets = named_targets(options.names, cache) if options.names else all_targets(cache)
    except UnknownNameError as error:
        print(error, file=sys.stderr)
        return 2
    done = read_results(options.results, key)
    again = bool(options.names) or options.again == "all"
    todo = [target for target in targets if again or _wanted(target, done, options.again)]
    logging.info("%d of %d networks to try", len(todo), len(targets))
    families = {target.name: target.family for target in todo}
    runs = _try_all(families, settings, options)
    counts = {"modules": len(timm_modules()), "networks": len(torchvision_names())}

    def write_table() -> None:
        page = render(list(done.values()), versions, key["settings"], **counts)
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(page)

    write_table()
    for name, result in runs:
        done[name] = {"name": name, "family": families[name], **result, **key}
        append_result(options.results, done[name])
        logging.info("%s: %s %s", name, result["outcome"], result["reason"])
        write_table()
    print(f"{summary(done.values(), **counts)}; table in {options.table}")
    broken = [t.name for t in targets if done[t.name]["outcome"] in FAILED]
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


def _try_all(
    names: Iterable[str], settings: Settings, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield results as they come; networks that exceed the memory are retried with fewer branches.

    Args:
        names: names of the networks.
        settings: how each network is tried.
        options: the command line's options, with limits and number of jobs.

    Yields:
        The name of each network, and its result.
    """
    too_large = []
    run = partial(
        run_isolated,
        limits=Limits(options.seconds, options.memory),
        jobs=options.jobs,
        preload=["bench.coverage.check"],
    )
    work = partial(check, threads=threads_per_process(options.jobs))
    for name, result in run(names, partial(work, settings=settings)):
        if result.get("out_of_memory") and settings.branches > FEWER_BRANCHES:
            logging.info("%s: %s; again with fewer branches", name, result["reason"])
            too_large.append(name)
        else:
            yield name, result
    if not too_large:
        return
    fewer = replace(settings, branches=FEWER_BRANCHES)
    for name, result in run(too_large, partial(work, settings=fewer)):
        yield name, result | {"branches": FEWER_BRANCHES}


def _wanted(target: Target, done: dict[str, dict[str, Any]], again: str | None) -> bool:
    """Whether a network has to be tried, now or once more."""
    result = done.get(target.name)
    return result is None or (again == "failed" and result["outcome"] != "exact")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--again", choices=("failed", "all"), help="try again what was tried")
    parser.add_argument("--ratio", type=float, default=Settings.ratio)
    parser.add_argument("--branches", type=int, default=Settings.branches)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps")
    parser.add_argument("--seconds", type=float, default=600, help="limit per network")
    parser.add_argument("--memory", type=float, default=16, help="limit per network, GiB")
    parser.add_argument(
        "--results", type=Path, default=Path("results/coverage/networks.jsonl"), help="JSON lines"
    )
    parser.add_argument("--table", type=Path, default=Path("docs/coverage.md"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # On SIGTERM, as on Ctrl-C, the command ends its processes as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
