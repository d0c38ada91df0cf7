"""The report as a Markdown text, for example for a pull request or a wiki."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from gpd_cli.files import atomic_path
from gpd_cli.report.predictions import Predictions
from gpd_cli.report.run import Run
from gpd_cli.report.summary import Table, caption, confusions, results, scores, settings

# Characters to escape. Underscores within words, as in names of options, mean nothing in Markdown.
_MARKUP = re.compile(r"[\\`*<>|]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")


def write_markdown(
    runs: Sequence[Run], predictions: Mapping[str, Predictions], path: Path, picture: str
) -> None:
    """Write a text with results, picture, differing settings, scores and confused classes.

    Args:
        runs: the runs to show, at least one.
        predictions: predictions of the run's networks, by name of the run.
        path: path of the file to write.
        picture: path of the picture, relative to the folder of this file.
    """
    parts = ["# " + ", ".join(_text(run.name) for run in runs)]
    parts += [_table(results(runs)), caption(runs)]
    parts += [_link(picture)]
    if len(runs) > 1:
        parts += ["## Settings that differ", _table(settings(runs))]
    for name, found in predictions.items():
        parts += [f"## What {_text(name)} sees in the {found.split} images", scores(found)]
        table = confusions(found)
        if table.rows:
            parts += ["Classes that the student confuses most often:", _table(table)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")


def is_report(path: Path, picture: str) -> bool:
    """Whether a file is a text of `write_markdown` that shows a certain picture.

    Args:
        path: path of the file, which need not exist.
        picture: path of the picture in the text, relative to the folder of this file.
    """
    if not path.is_file():
        return False
    return _link(picture) in path.read_text(encoding="utf-8", errors="replace")


def _link(picture: str) -> str:
    return f"![accuracy, gap, loss and learning rate]({quote(os.fsencode(picture))})"


def _table(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(map(_text, row))} |" for row in rows)


def _text(name: str) -> str:
    r"""Put a name or value on one line, and escape characters with a meaning in Markdown.

    Example:
        >>> print(_text("a|b <i> __c__ data.num_workers"))
        a\|b \<i\> \_\_c\_\_ data.num_workers
    """
    return _MARKUP.sub(r"\\\g<0>", " ".join(name.splitlines()))
