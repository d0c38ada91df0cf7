"""Which run goes on, and from which of its checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from gpd_cli.cli.arguments import CHECKPOINT, occurrences
from gpd_cli.cli.environment import latest_start
from gpd_cli.distributed.cluster import requeue_path
from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files import check_whole, short_path

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
        newest = newest_checkpoint(run)
        if newest is None:
            raise GpdError(
                f"There is no checkpoint in {run} yet; start the run again: "
                f"gpd fit -c {run / _CONFIGURATION}"
            )
        _say(f"going on from {newest}")
        options += [CHECKPOINT, str(newest)]
    return options, run


def last_checkpoint(logger: Mapping[str, Any], needed: bool = False) -> str | None:
    """The newest whole checkpoint of the runs of a name; None, and a line that says so, without.

    It is one of the run that was started last.

    Args:
        logger: ``save_dir`` and ``name`` of the table of a run of this name.
        needed: whether nothing can be done without a checkpoint.

    Raises:
        GpdError: when one is needed, and there is none.
    """
    runs = Path(logger["save_dir"], logger["name"] or "")
    found = sorted((run for run in _versions(runs) if _checkpoints(run)), key=_age, reverse=True)
    newest = next((path for run in found if (path := newest_checkpoint(run))), None)
    if newest is None and needed:
        raise GpdError(f"There is no checkpoint in {runs}; give {CHECKPOINT} FILE.")
    if newest is None:
        _say(f"there is no checkpoint in {runs} yet; the run begins at its beginning")
        return None
    _say(f"the newest checkpoint in {runs} is {newest}")
    return str(newest)


def requeued_run(folder: str | Path) -> tuple[str, Path] | None:
    """The checkpoint and the run that a requeued SLURM job goes on with, named in a line.

    Args:
        folder: the Trainer's ``default_root_dir``.

    Returns:
        The path of the checkpoint and the run's folder; None for any other run, and for a job whose
        checkpoint lies in no folder of a run.
    """
    path = requeue_path(folder)
    if path is None or not path.is_file():
        return None
    checkpoint = Path(short_path(path.resolve()))
    run = checkpoint.parent.parent
    if not (run / _CONFIGURATION).is_file():
        return None
    _say(f"going on from {checkpoint}")
    return str(path), run


def newest_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of a run with the most updates behind it; damaged ones are named.

    Copying a folder gives files other times, so that these decide only among as many updates, and
    where the run was put back to an earlier checkpoint: what it had made beyond that comes last.

    Args:
        run: folder of the run.
    """
    start = latest_start(run)
    order: dict[Path, tuple[bool, int, int]] = {}
    for path in _checkpoints(run):
        try:
            step, modified = _updates(path), path.stat().st_mtime_ns
        except (WeightsError, OSError) as error:
            _pass_over(error)
            continue
        given_up = start is not None and step > start.step and modified < start.time * 1e9
        order[path] = (not given_up, step, modified)
    for path in sorted(order, key=order.__getitem__, reverse=True):
        try:
            check_whole(path)
        except (WeightsError, OSError) as error:
            _pass_over(error)
            continue
        return path
    return None


def _checkpoints(run: Path) -> list[Path]:
    return [p for p in run.rglob("*.ckpt") if p.is_file() and not p.name.startswith(".")]


def _updates(path: Path) -> int:
    """The updates behind a checkpoint, read without its tensors; -1 where it does not tell.

    Raises:
        WeightsError: when it is damaged.
        OSError: when it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return int(content["global_step"])
    except Exception:  # torch raises many types; a checkpoint may be one of another program
        check_whole(path)
        return -1


def _age(run: Path) -> tuple[float, int]:
    """What runs are ordered by: the time of their latest start, and then their number."""
    start = latest_start(run)
    if start is not None:
        return start.time, _number(run)
    return max(path.stat().st_mtime for path in _checkpoints(run)), _number(run)


def _versions(runs: Path) -> list[Path]:
    """The runs of a name. A copy, such as ``version_0_backup``, is none of them."""
    return [run for run in runs.glob("version_*") if _number(run) >= 0]


def _number(run: Path) -> int:
    number = run.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def _pass_over(error: Exception) -> None:
    _say(f"{str(error).partition(';')[0]}; taking another one")


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
    versions = [run for run in _versions(path) if (run / _CONFIGURATION).is_file()]
    if versions:
        return max(versions, key=_number)
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
