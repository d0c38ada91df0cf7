"""Choice of the run to resume, and of the checkpoint that the run goes on from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from gpd_cli.cli.arguments import CHECKPOINT, occurrences
from gpd_cli.cli.environment import latest_start
from gpd_cli.data import ImageSpec
from gpd_cli.distributed.requeue import requeue_path
from gpd_cli.errors import GpdError, WeightsError
from gpd_cli.files import check_whole, glance, is_remote, short_path
from gpd_cli.run_folder import CHECKPOINTS, CONFIGURATION, GIVEN_UP

RESUME = "--resume"
_ROOT = ("--data.root", "--data.init_args.root")
NEWEST = "last"
"""The value of ``--ckpt_path`` that stands for the newest checkpoint of all runs of one name."""


def resumed_run(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Replace ``--resume RUN`` by the run's own configuration and its newest checkpoint.

    All other options follow the configuration, and so override it.

    Args:
        arguments: the command line, beginning with the command.

    Returns:
        The new command line, and the run's folder. Without the option, the command line is
        unchanged and the folder is None.

    Raises:
        GpdError: when there is no such run, or the run has no checkpoint.
    """
    given = [value for _, value in occurrences(arguments, (RESUME,))]
    if not given:
        return list(arguments), None
    if given[-1].startswith("-") or not given[-1]:
        raise GpdError(f"{RESUME} needs the folder of a run, such as runs/digits/version_0.")
    run = _run_folder(given[-1])
    command, *others = _without(arguments, RESUME)
    chosen = [Path(value) for _, value in occurrences(others, (CHECKPOINT,))]
    began: list[str] = []
    if not chosen:
        newest = newest_checkpoint(run)
        if newest is None:
            raise GpdError(
                f"There is no checkpoint in {run} yet; start the run again: "
                f"gpd fit -c {run / CONFIGURATION}"
            )
        _say(f"going on from {newest}")
        began = [CHECKPOINT, str(newest)]
        chosen = [newest]
    start = chosen[-1] if chosen[-1].is_file() else newest_checkpoint(run)
    # The command line and its configurations may name other data, and so come later.
    data = [] if start is None or any(occurrences(others, _ROOT)) else _data_of_training(start)
    return [command, "--config", str(run / CONFIGURATION), *data, *others, *began], run


def _data_of_training(checkpoint: Path) -> list[str]:
    """The option for the data of a run whose configuration has a relative path to its data.

    In another working directory, this path may mean other data, or none.

    Args:
        checkpoint: path of the checkpoint to go on from.
    """
    content = glance(checkpoint)
    try:
        given = content["datamodule_hyper_parameters"]["root"]
        trained = ImageSpec.from_dict(content["gpd"]["images"])
    except (LookupError, TypeError):  # a checkpoint of another program, or of other data
        return []
    root = None if trained is None else trained.present_root(given)
    return [] if root in (None, given) else [_ROOT[0], str(root)]


def newest_of_all_runs(logger: Mapping[str, Any], needed: bool = False) -> str | None:
    """Find the newest intact checkpoint among all runs of one name, and print its path.

    The checkpoint is taken from the run that was started last, and from an earlier run only if no
    later run has an intact checkpoint.

    Args:
        logger: settings of the CSV logger: ``save_dir`` and ``name``, and perhaps a ``version``,
            which then is the name of a run's folder instead of ``version_N``.
        needed: whether the command cannot work without a checkpoint.

    Returns:
        The path of the checkpoint; None if there is none, which is printed as well.

    Raises:
        GpdError: when a checkpoint is needed, and there is none, or runs are in a remote folder.
    """
    if is_remote(str(logger["save_dir"])):
        raise GpdError(
            f"{CHECKPOINT} {NEWEST} does not look into {logger['save_dir']}; copy a checkpoint "
            "from there, and give the file."
        )
    runs = Path(logger["save_dir"], logger["name"] or "")
    versions = _versions(runs)
    if (chosen := logger.get("version")) is not None and (runs / str(chosen)).is_dir():
        versions.append(runs / str(chosen))
    found = sorted((run for run in versions if _checkpoints(run)), key=_age, reverse=True)
    newest = next((path for run in found if (path := newest_checkpoint(run))), None)
    if newest is None and needed:
        raise GpdError(f"There is no checkpoint in {runs}; give {CHECKPOINT} FILE.")
    if newest is None:
        _say(f"there is no checkpoint in {runs} yet; the run starts from the beginning")
        return None
    _say(f"the newest checkpoint in {runs} is {newest}")
    return str(newest)


def requeued_run(folder: str | Path) -> tuple[str, Path] | None:
    """Find the checkpoint and the run with which a requeued SLURM job goes on, and print the path.

    Args:
        folder: the Trainer's ``default_root_dir``.

    Returns:
        The path of the checkpoint, and the run's folder; None if this is not a requeued job, or if
        its checkpoint does not lie in the folder of a run.
    """
    path = requeue_path(folder)
    if path is None or not path.is_file():
        return None
    checkpoint = Path(short_path(path.resolve()))
    run = checkpoint.parent.parent
    if not (run / CONFIGURATION).is_file():
        return None
    _say(f"going on from {checkpoint}")
    return str(path), run


def newest_checkpoint(run: Path) -> Path | None:
    """Find the newest intact checkpoint of a run: the one after the most updates.

    The time of a file decides only between checkpoints after the same number of updates, since
    copying a folder may change times. There is one exception: if the run was put back to an earlier
    checkpoint, later checkpoints from before this restart are considered last, and after them those
    of weights alone, from which no run can go on. Damaged checkpoints are reported and passed over.

    Args:
        run: folder of the run.

    Returns:
        The path of the checkpoint; None if there is no intact one.
    """
    start = latest_start(run)
    order: dict[Path, tuple[bool, bool, int, int]] = {}
    for path in _checkpoints(run):
        try:
            (step, is_whole), modified = _updates(path), path.stat().st_mtime_ns
        except (WeightsError, OSError) as error:
            _pass_over(error)
            continue
        is_before = start is not None and step > start.step and modified < start.time * 1e9
        given_up = is_before or path.name == GIVEN_UP
        order[path] = (is_whole, not given_up, step, modified)
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


def _updates(path: Path) -> tuple[int, bool]:
    """The number of updates made before a checkpoint, and whether it has the optimizer's state.

    If the file does not tell, the result is -1 and False. The checkpoint's tensors are not read.

    Raises:
        WeightsError: when the file is damaged.
        OSError: when the file cannot be read.
    """
    content = glance(path)
    step = content.get("global_step")
    if not isinstance(step, int):
        check_whole(path)  # an intact one may be that of another program
        return -1, False
    return step, bool(content.get("optimizer_states"))


def _age(run: Path) -> tuple[float, int]:
    """Sort key of a run: the time of its latest start, then the number of its version."""
    start = latest_start(run)
    if start is not None:
        return start.time, _number(run)
    return max(path.stat().st_mtime for path in _checkpoints(run)), _number(run)


def _versions(runs: Path) -> list[Path]:
    """The folders ``version_N`` of runs; copies such as ``version_0_backup`` are left out."""
    return [run for run in runs.glob("version_*") if _number(run) >= 0]


def _number(run: Path) -> int:
    number = run.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def _pass_over(error: Exception) -> None:
    _say(f"{str(error).partition(';')[0]}; another checkpoint is used")


@rank_zero_only
def _say(text: str) -> None:
    print(f"gpd: {text}", file=sys.stderr)


def _run_folder(value: str) -> Path:
    """The folder of the run that a value of ``--resume`` means.

    The value may be the folder of the run, a folder with several runs, of which the one with the
    highest version number is taken, or a path within the run: a file, or its folder of checkpoints.
    """
    path = Path(value)
    if path.is_file():
        path = path.parent
    if path == Path():  # has no name
        path = path.absolute()
    for folder in (path, path.parent if path.name == CHECKPOINTS else path):
        if (folder / CONFIGURATION).is_file():
            return folder
    versions = [run for run in _versions(path) if (run / CONFIGURATION).is_file()]
    if versions:
        return max(versions, key=_number)
    raise GpdError(
        f"{RESUME} {value}: there is no run with a {CONFIGURATION}; give the folder of a run, such "
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
