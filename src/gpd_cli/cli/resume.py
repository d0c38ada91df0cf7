"""Which run goes on, and from which of its checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from gpd_cli.cli.arguments import CHECKPOINT, occurrences
from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files import check_whole

RESUME = "--resume"
LAST = "last"
"""The value of ``--ckpt_path`` that stands for the newest checkpoint of the runs of a name."""
_CONFIGURATION = "config.yaml"


def resumed_run(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The command line with a run's own configuration and newest checkpoint, for ``--resume RUN``.

    What else is on the command line comes after the configuration, and so above it.

    Args:
        arguments: the command line, its command first.

    Returns:
        The command line and the run's folder; unchanged and None without the option.

    Raises:
        GpdError: when there is no such run, or no checkpoint of it.
    """
    given = [value for _, value in occurrences(arguments, (RESUME,))]
    if not given:
        return list(arguments), None
    if given[-1].startswith("-") or not given[-1]:
        raise GpdError(f"{RESUME} needs the folder of a run, such as runs/digits/version_0.")
    run = _run_folder(given[-1])
    command, *others = _without(arguments, RESUME)
    options = [command, "--config", str(run / _CONFIGURATION), *others]
    if not any(occurrences([command, *others], (CHECKPOINT,))):
        newest = newest_checkpoint([run])
        if newest is None:
            raise GpdError(
                f"There is no checkpoint in {run} yet; start the run again: "
                f"gpd fit -c {run / _CONFIGURATION}"
            )
        options += [CHECKPOINT, str(newest)]
    return options, run


def last_checkpoint(logger: Mapping[str, Any], needed: bool = False) -> str | None:
    """The newest whole checkpoint of the runs of a name; None, and a line that says so, without.

    Args:
        logger: ``save_dir`` and ``name`` of the table of a run of this name.
        needed: whether nothing can be done without a checkpoint.

    Raises:
        GpdError: when one is needed, and there is none.
    """
    runs = Path(logger["save_dir"], logger["name"] or "")
    newest = newest_checkpoint(runs.glob("version_*"))
    if newest is None and needed:
        raise GpdError(f"There is no checkpoint in {runs}; give {CHECKPOINT} FILE.")
    if newest is None:
        _say(f"there is no checkpoint in {runs} yet; the run begins at its beginning")
        return None
    _say(f"the newest checkpoint in {runs} is {newest}")
    return str(newest)


def newest_checkpoint(runs: Iterable[Path]) -> Path | None:
    """The checkpoint that was written last, of those that are whole; damaged ones are named.

    Args:
        runs: folders of runs.
    """
    found = [path for run in runs for path in run.rglob("*.ckpt") if path.is_file()]
    found = [path for path in found if not path.name.startswith(".")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            check_whole(path)
        except (WeightsError, OSError) as error:
            _say(f"{str(error).partition(';')[0]}; taking the one before")
            continue
        return path
    return None


@rank_zero_only
def _say(text: str) -> None:
    print(f"gpd: {text}", file=sys.stderr)


def _run_folder(value: str) -> Path:
    """The run that is meant: by its folder, by that of its runs, or by one of its checkpoints."""
    path = Path(value)
    if path.is_file():
        path = path.parent
    for folder in (path, path.parent if path.name == "checkpoints" else path):
        if (folder / _CONFIGURATION).is_file():
            return folder
    versions = [p.parent for p in path.glob(f"version_*/{_CONFIGURATION}")]
    if versions:
        return max(versions, key=lambda p: int(p.name.rpartition("_")[2] or 0))
    raise GpdError(
        f"{RESUME} {value}: there is no run with a {_CONFIGURATION}; give the folder of one, such "
        "as runs/digits/version_0."
    )


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """The command line without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
