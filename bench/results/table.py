"""Tables of runs, which define rows, seeds and learning rates, and are read from YAML files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from bench.results.conclusions import Conclusion

LEARNING_RATE = "model.optimizer.lr"
_SPARSE = "trainer.check_val_every_n_epoch"
METRICS = ("test", "validation")

_MAPPING = "a mapping of names to values"
_FORMS: Mapping[str, tuple[type, str]] = {
    **dict.fromkeys(("title", "about", "config", "versus", "tuned_as"), (str, "a text")),
    **dict.fromkeys(("settings", "files", "tuning", "rows"), (Mapping, _MAPPING)),
    **dict.fromkeys(("grid", "seeds", "headline", "reading"), (list, "a list")),
}
"""The types of entries, of the table as well as of its rows and its tuning, with their names."""


class TableError(Exception):
    """Raised when a table or a record cannot be used; the message is a sentence with a remedy."""


@dataclass(frozen=True)
class Tuning:
    """How a row's learning rate is chosen: the best of a grid on held-out training images.

    Args:
        grid: learning rates to try, in ascending order.
        seed: seed of the tuning runs, which try one learning rate each.
        settings: further options of the tuning runs, such as fewer epochs.
    """

    grid: tuple[float, ...]
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One way of training, run once for every seed.

    Args:
        key: name of the row in the table's file and among the records.
        title: name of the row on the page.
        settings: options of ``gpd fit`` in addition to those of the whole table.
        versus: key of the row that this row is compared with.
        tuned_as: key of the row whose learning rate this row takes; by default, the row's own
            tuning runs decide. A row with this entry has neither `grid` nor `tuning`.
        grid: learning rates to try in place of the table's, for example for another optimizer.
        files: for each option of ``gpd fit`` that takes a file of weights, the key of the row whose
            extracted student is this file; the student is that of the same seed if there is one,
            and otherwise that of the row's first seed.
        seeds: seeds in place of the table's.
        tuning: options of the row's tuning runs in addition to those of the table's tuning.
    """

    key: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versus: str | None = None
    tuned_as: str | None = None
    grid: tuple[float, ...] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other.

    Args:
        name: name of the table's file without suffix, and of the folder of its records.
        title: heading of the table's section on the page.
        about: text on networks, data and measurement, for the page.
        config: configuration of ``gpd fit`` that all rows build on.
        settings: options of all rows.
        tuning: how learning rates are chosen.
        seeds: seeds of all rows that have none of their own.
        rows: the rows by key.
        headline: keys of the rows that the README shows.
        conclusions: conclusions from the numbers, the entry ``reading`` of the file.
        metric: ``test`` to compare rows on test images; ``validation`` for tables that serve to
            choose settings: their runs are compared on held-out training images, and not tested.
    """

    name: str
    title: str
    about: str
    config: str
    settings: Mapping[str, Any]
    tuning: Tuning
    seeds: tuple[int, ...]
    rows: Mapping[str, Row]
    headline: tuple[str, ...] = ()
    conclusions: tuple[Conclusion, ...] = ()
    metric: str = "test"

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        """The seeds of a row."""
        return self.seeds if row.seeds is None else row.seeds

    def grid_of(self, row: Row) -> tuple[float, ...]:
        """The learning rates among which a row's own is chosen."""
        return self.tuning.grid if row.grid is None else row.grid

    def tuned(self, row: Row) -> Row:
        """The row whose tuning runs decide a row's learning rate: the row itself or another."""
        return row if row.tuned_as is None else self.rows[row.tuned_as]


def read_table(path: Path) -> Table:
    """Read a table from a file.

    Args:
        path: path of the YAML file; see `Table`, `Tuning` and `Row` for its entries.

    Raises:
        TableError: when the file cannot be read, or an entry is unknown, missing, of another form
            than it has to be, or names a row that does not exist.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TableError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise TableError(f"{path} has no entries; see results/README.md for what a table holds.")
    try:
        entries = {"settings": {}, **_entries("the table", content)}
        table = Table(
            name=path.stem,
            tuning=Tuning(**_entries("tuning", entries.pop("tuning", {}))),
            rows={key: _row(key, row) for key, row in entries.pop("rows", {}).items()},
            conclusions=tuple(map(_conclusion, entries.pop("reading", ()))),
            **entries,
        )
    except ValueError as error:
        raise TableError(f"{path}: {error}.") from error
    except TypeError as error:
        raise TableError(f"{path}: {str(error).partition('__init__() ')[2] or error}.") from error
    _check(path, table)
    return table


def option_list(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of a command line.

    Args:
        settings: values by option, without hyphens.

    Example:
        >>> option_list({"model.ratio": 2, "model.branches": ["dbb"]})
        ['--model.ratio=2', '--model.branches=["dbb"]']
    """
    return [f"--{name}={_text(value)}" for name, value in settings.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)  # JSON is valid YAML in one line


def _entries(place: str, entries: Any) -> dict[str, Any]:
    """The entries of a mapping that have a value, with lists as tuples.

    Args:
        place: what has the entries, for messages.
        entries: content of the table's file at this place.

    Raises:
        TypeError: when `entries` is not a mapping, or an entry has another form than in `_FORMS`.
    """
    if not isinstance(entries, Mapping):
        raise TypeError(f"{place} is {entries!r}; it has to be {_MAPPING}")
    given = {name: value for name, value in entries.items() if value is not None}
    for name, value in given.items():
        kind, form = _FORMS.get(name, (object, ""))
        if not isinstance(value, kind):
            raise TypeError(f"in {place}, {name} is {value!r}; it has to be {form}")
    return {k: tuple(value) if isinstance(value, list) else value for k, value in given.items()}


def _row(key: Any, entries: Any) -> Row:
    if not isinstance(key, str):
        raise TypeError(f"the name of the row {key!r} is no text; put it in quotes")
    return Row(key, **_entries(f"the row {key!r}", entries))


def _conclusion(entries: Any) -> Conclusion:
    if not isinstance(entries, Mapping):
        raise ValueError(f"a reading is a mapping of conditions to sentences, not {entries!r}")
    sentences = dict(entries)
    topic = sentences.pop("topic", None)
    if not isinstance(topic, str | None):
        raise ValueError(f"a reading has the topic {topic!r}, which is no text; put it in quotes")
    return Conclusion({str(name): str(text) for name, text in sentences.items()}, topic)


def _check(path: Path, table: Table) -> None:
    rows = table.rows.values()
    named: Sequence[tuple[str, Any]] = [
        *((f"{row.key}.versus", row.versus) for row in rows if row.versus is not None),
        *((f"{row.key}.tuned_as", row.tuned_as) for row in rows if row.tuned_as is not None),
        *((f"{row.key}.files", key) for row in rows for key in row.files.values()),
        *(("headline", key) for key in table.headline),
        *(("reading", key) for found in table.conclusions for key in found.rows()),
    ]
    _check_conclusions(path, table)
    if table.metric not in METRICS:
        raise TableError(f"{path}: metric is {table.metric!r}; it is {' or '.join(METRICS)}.")
    for place, key in named:
        if not isinstance(key, str) or key not in table.rows:
            raise TableError(
                f"{path}: {place} names the row {key!r}, which is not there; the rows are "
                f"{', '.join(table.rows)}."
            )
    try:
        TopologicalSorter({row.key: row.files.values() for row in rows}).prepare()
    except CycleError as error:
        raise TableError(
            f"{path}: the rows {', '.join(error.args[1][:-1])} need the students of each other; "
            "change the files of one of them."
        ) from error
    for settings in (
        *(table.settings, table.tuning.settings),
        *(settings for row in rows for settings in (row.settings, row.tuning)),
    ):
        if settings.get(_SPARSE, 1) != 1:
            raise TableError(
                f"{path}: the page needs the accuracies after every epoch; remove {_SPARSE}."
            )
    _check_seed(path, "tuning", table.tuning.seed)
    for row in rows:
        _check_row(path, table, row)


def _check_seed(path: Path, place: str, seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise TableError(f"{path}: {place} has the seed {seed!r}; give a whole number, at least 0.")


def _check_row(path: Path, table: Table, row: Row) -> None:
    if row.versus == row.key:
        raise TableError(f"{path}: {row.key}.versus names the row itself; name another one.")
    if row.tuned_as is not None:
        if table.rows[row.tuned_as].tuned_as is not None:
            raise TableError(
                f"{path}: {row.key}.tuned_as names {row.tuned_as!r}, which is tuned as another row "
                "itself; name that one."
            )
        if row.grid is not None or row.tuning:
            raise TableError(
                f"{path}: {row.key} takes its learning rate from {row.tuned_as!r}, and has a grid "
                "or tuning of its own; remove these, or tuned_as."
            )
    rates, seeds = table.grid_of(row), table.seeds_of(row)
    if not rates or not seeds:
        raise TableError(f"{path}: {row.key} has no learning rates or no seeds; give some.")
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise TableError(
                f"{path}: the learning rate {rate!r} of {row.key} is no number above 0; YAML takes "
                "one with an exponent for a text unless it has a point (1.0e-3)."
            )
    for seed in seeds:
        _check_seed(path, row.key, seed)
    # Their runs would have the same name, which for learning rates has six digits.
    for what, names in (("learning rate", [f"{rate:g}" for rate in rates]), ("seed", seeds)):
        if twice := [name for name, number in Counter(names).items() if number > 1]:
            raise TableError(
                f"{path}: {row.key} has the {what} {twice[0]} several times; give it once."
            )


def _check_conclusions(path: Path, table: Table) -> None:
    topics = Counter(found.topic for found in table.conclusions if found.topic is not None)
    if twice := [topic for topic, number in topics.items() if number > 1]:
        raise TableError(f"{path}: two readings have the topic {twice[0]!r}; name another one.")
    for conclusion in table.conclusions:
        for key in conclusion.compared():
            if key in table.rows and table.rows[key].versus is None:
                raise TableError(
                    f"{path}: a reading compares the row {key!r}, which has no 'versus'; add it."
                )
