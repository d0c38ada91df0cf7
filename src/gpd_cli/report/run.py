"""Reading of what a run of `fit` has written to its folder: log and configuration."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gpd_cli.errors import GpdError
from gpd_cli.files import glance
from gpd_cli.run_folder import BEST, CHECKPOINTS, CONFIGURATION, GIVEN_UP, METRICS

# Settings that say where a run is stored and how it is shown, and not how it is trained.
_ABOUT_FILES = (
    "ckpt_path",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
)
_SELECTOR = "val/student_top1"


class ReportError(GpdError):
    """Raised when there is nothing to report on, or no report can be made."""


@dataclass(frozen=True)
class Run:
    """The log and the settings of a run.

    Args:
        name: name of the run in the report, which differs from those of other runs.
        folder: folder of the run.
        epochs: for each epoch, counted from 1, the logged values by their names in
            ``metrics.csv``: accuracies in percent, the gap in points, and losses; if there were
            several validations in an epoch, those of the best one.
        steps: for each logged step, its values by name: ``step``, counted from 0, learning rate,
            images per second and others.
        settings: settings of the run by names of options, without hyphens.
        first: the first epoch that this run trained itself; earlier epochs are from the log of the
            run whose checkpoint this run started from.
        lacking: a sentence if the log of earlier epochs was not found; otherwise empty.
    """

    name: str
    folder: Path
    epochs: dict[int, dict[str, float]]
    steps: list[dict[str, float]]
    settings: dict[str, Any] = field(default_factory=dict)
    first: int = 1
    lacking: str = ""

    @property
    def own_epochs(self) -> list[int]:
        """The epochs that this run trained itself, in order."""
        return [n for n in sorted(self.epochs) if n >= self.first]

    @property
    def best_epoch(self) -> int | None:
        """The epoch of ``best.ckpt``: the first of the run's own epochs with the best validation.

        If the run was put back to an earlier checkpoint, ``best.ckpt`` was chosen anew, and tells
        its epoch itself. None if nothing was validated.
        """
        scored = [n for n in self.own_epochs if _SELECTOR in self.epochs[n]]
        if self.checkpoint(GIVEN_UP) is not None and (best := self.checkpoint(BEST)) is not None:
            epoch = glance(best).get("epoch")
            if isinstance(epoch, int) and epoch + 1 in scored:
                return epoch + 1
        return max(scored, key=lambda n: self.epochs[n][_SELECTOR], default=None)

    def checkpoint(self, name: str) -> Path | None:
        """The path of a checkpoint of the run; None if there is no such checkpoint.

        Args:
            name: name of the checkpoint, `BEST`, `GIVEN_UP`, `LAST` or `STOPPED`.
        """
        path = self.folder / CHECKPOINTS / name
        return path if path.is_file() else None

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """The epochs in which a value was logged, and the value in each of them.

        Args:
            name: name of the value, such as ``val/gap``.
        """
        epochs = [n for n in sorted(self.epochs) if name in self.epochs[n]]
        return epochs, [self.epochs[n][name] for n in epochs]

    def names(self, prefix: str) -> list[str]:
        """Names of logged values that begin with a prefix, in alphabetical order."""
        found = {name for values in self.epochs.values() for name in values}
        return sorted(name for name in found if name.startswith(prefix))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, and give each a name that differs from the others.

    Args:
        folders: folders of the runs; a folder that is given twice counts once.

    Raises:
        ReportError: when a folder is not that of a run, or a run has logged nothing yet.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    return [read_run(folder, name) for folder, name in zip(unique, run_names(unique), strict=True)]


def read_run(folder: Path, name: str | None = None, later: Collection[Path] = ()) -> Run:
    """Read a run from its folder.

    If the run started from a checkpoint of another run, the log of that run is read as well.

    Args:
        folder: folder of the run, with ``metrics.csv`` and, if it is complete, ``config.yaml``.
        name: name for the run; by default the last two parts of its path.
        later: folders of runs that have started, directly or indirectly, from a checkpoint of this
            one; their logs are not followed again.

    Raises:
        ReportError: when the folder is not that of a run, or the run has logged nothing yet.
    """
    if not (folder / METRICS).is_file():
        raise ReportError(
            f"{folder} is not the folder of a run: there is no {METRICS} in it{_at(folder)}."
        )
    epochs, steps = _read_log(folder / METRICS)
    if not epochs:
        raise ReportError(
            f"{METRICS} in {folder} has no complete epoch yet; wait until the first epoch has "
            "ended."
        )
    config = _configuration(folder / CONFIGURATION)
    first, lacking = min(epochs), ""
    if first > 1 or config.get("ckpt_path"):
        before, steps_before, lacking = _before(folder, config, first, later)
        epochs = before | epochs
        start = min((row["step"] for row in steps if "step" in row), default=0)
        steps = [row for row in steps_before if row.get("step", start) < start] + steps
    name = name or run_names([folder])[0]
    return Run(name, folder, epochs, steps, _settings(config), first, lacking)


def _before(
    folder: Path, config: Mapping[str, Any], first: int, later: Collection[Path]
) -> tuple[dict[int, dict[str, float]], list[dict[str, float]], str]:
    """Read the logs of earlier runs, for a run that started from a checkpoint of another run.

    Args:
        folder: folder of the run.
        config: configuration of the run, which names the checkpoint.
        first: the first epoch that the run trained itself.
        later: folders of runs that have started from a checkpoint of this one.

    Returns:
        Epochs and steps of all earlier runs, in the form of `Run`, and a sentence if their log was
        not found (otherwise empty).
    """
    checkpoint = config.get("ckpt_path")
    # The path is as the user typed it, relative to the folder in which the run was started. This is
    # probably one of the folders above the run's folder. The present folder is tried last, since it
    # may hold other runs of the same names.
    roots = (*folder.resolve().parents, Path())
    found = [root / checkpoint for root in roots] if isinstance(checkpoint, str) else []
    # Do not follow circles: a run may have started from a run that itself had started from an
    # earlier run in the same folder.
    closed = {folder.resolve(), *later}
    for path in found:
        origin = path.parent.parent
        if (origin / METRICS).is_file() and origin.resolve() not in closed:
            earlier = read_run(origin, later=closed)
            epochs = {n: values for n, values in earlier.epochs.items() if n < first}
            return epochs, earlier.steps, earlier.lacking
    if first == 1:
        return {}, [], ""
    source = f", of {checkpoint}," if checkpoint else ""
    return {}, [], f"The log of the epochs before {first}{source} was not found."


def _read_log(path: Path) -> tuple[dict[int, dict[str, float]], list[dict[str, float]]]:
    """Read epochs and steps, in the form of `Run`, from the file ``metrics.csv`` of a run."""
    epochs: dict[int, dict[str, float]] = {}
    steps: list[dict[str, float]] = []
    try:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                values = {key: float(value) for key, value in line.items() if value}
                if "epoch" not in values:
                    continue
                scores = {key: value for key, value in values.items() if "/" in key}
                if scores:
                    _add(epochs.setdefault(int(values["epoch"]) + 1, {}), scores)
                else:
                    steps.append(values)
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ReportError(
            f"{path} cannot be read as the log of a run ({error}); give a folder that gpd fit "
            "wrote."
        ) from error
    return epochs, steps


def _add(epoch: dict[str, float], scores: Mapping[str, float]) -> None:
    """Add the values of a row to those of its epoch, in place.

    If an epoch has several validations, the values of the one that was best for the student are
    kept, and of equally good ones the first; ``best.ckpt`` is chosen in the same way.

    Args:
        epoch: values of the epoch so far, by name.
        scores: values of the row, by name.
    """
    if scores.get(_SELECTOR, math.inf) <= epoch.get(_SELECTOR, -math.inf):
        scores = {name: value for name, value in scores.items() if not name.startswith("val/")}
    epoch.update(scores)


def run_names(folders: Sequence[Path]) -> list[str]:
    """Names for runs: the ends of their paths, from the point at which the paths differ.

    Args:
        folders: folders of the runs, all different.

    Example:
        >>> run_names([Path("runs/demo/gpd"), Path("runs/demo/alone")])
        ['gpd', 'alone']
        >>> run_names([Path("/a/runs/digits/version_0")])
        ['digits/version_0']
    """
    paths = [folder.resolve() for folder in folders]
    if len(paths) == 1:
        return ["/".join(paths[0].parts[-2:])]
    common = Path(os.path.commonpath(paths))
    return [(path.relative_to(common)).as_posix() for path in paths]


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs.

    Args:
        runs: the runs to compare, at least one.

    Returns:
        For each setting, by name, its values in the order of the runs; None for a run that does not
        have the setting.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration: its entries by the names of the options that set them.

    Args:
        config: the nested configuration, in which classes have ``class_path`` and ``init_args``.

    Example:
        >>> flat_settings({"data": {"class_path": "mine.Data", "init_args": {"size": 8}}, "a": [1]})
        {'data': 'mine.Data', 'data.size': 8, 'a': [1]}
    """
    flat: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and "class_path" in value:
            flat[name] = value["class_path"]
            value = value.get("init_args") or {}
        elif not isinstance(value, Mapping) or not value:
            flat[name] = value
            return
        for key, entry in value.items():
            put(f"{name}.{key}" if name else str(key), entry)

    for key, entry in config.items():
        put(str(key), entry)
    return flat


def _configuration(path: Path) -> dict[str, Any]:
    """Read a run's configuration; empty if the file does not exist or cannot be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that say how a run was trained."""
    flat = flat_settings(config)
    return {name: value for name, value in flat.items() if not name.startswith(_ABOUT_FILES)}


def _at(folder: Path) -> str:
    """A hint for an error message: which folders of runs there are below a folder."""
    found = sorted(folder.glob(f"*/{METRICS}")) or sorted(folder.glob(f"*/*/{METRICS}"))
    if not found:
        return "; give a folder that gpd fit wrote, such as runs/digits/version_0"
    listed = ", ".join(str(path.parent) for path in found[:3])
    return f"; folders of runs below it are {listed}{' and others' if len(found) > 3 else ''}"
