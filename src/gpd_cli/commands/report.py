"""`gpd report`: an HTML page, a picture and a Markdown text about one or several runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from gpd_cli.errors import GpdError, reason_of
from gpd_cli.files import check_writable, short_path
from gpd_cli.report.markdown import is_report, write_markdown
from gpd_cli.report.picture import draw
from gpd_cli.report.predictions import Predictions, predict
from gpd_cli.report.run import ReportError, Run, read_runs
from gpd_cli.run_folder import BEST, LAST, REPORT

_PACKAGES = ("plotly", "jinja2")
_INSTALL = "pip install 'gpd-cli[report]'"


def report_command(
    runs: Sequence[Path],
    output: Path | None = None,
    split: Literal["validation", "test", "none"] = "validation",
) -> None:
    """Write a page about runs of fit, and beside it a picture (.png) and a text (.md).

    Args:
        runs: folders of the runs.
        output: path of the page to write (.html); by default report.html in the folder of the run,
            or, for several runs, in the working directory.
        split: the images on which the networks of best.ckpt are run, to show accuracy by class,
            confusions and disagreements; none leaves this part out, which is quick.

    Raises:
        ReportError: when a run cannot be read, or a package is missing.
    """
    if lacking := missing_packages():
        raise ReportError(f"A report needs {' and '.join(lacking)}: {_INSTALL}.")
    found = read_runs(runs)
    page = output or (found[0].folder if len(found) == 1 else Path()) / REPORT
    if page.suffix != ".html":
        raise ReportError(f"The report {page} must end in .html.")
    picture, text = page.with_suffix(".png"), page.with_suffix(".md")
    for path in (page, picture, text):
        check_writable(path)
    is_again = page.exists() and is_report(text, picture.name)
    for path in (page, picture, text):
        if path.exists() and path != page and not is_again:
            raise ReportError(
                f"The report {page} would replace {path}, which is none of its own; choose another "
                "name, or move that file."
            )
    predictions, missing = _predictions(found, split)
    missing = [f"{run.name}: {run.lacking}" for run in found if run.lacking] + missing
    from gpd_cli.report.page import write_page  # imported here since it needs optional packages

    write_page(found, predictions, missing, page)
    # The text is written first: by the text, `is_report` tells a report's picture from other files.
    write_markdown(found, predictions, text, picture.name)
    draw(found, picture)
    for sentence in missing:
        print(sentence)
    print(f"Report written to {page}, {picture.name} and {text.name}")


def write_short_report(run: Run) -> str:
    """Write ``report.html`` beside a run's log, without the parts that take long.

    Args:
        run: the run to report on.

    Returns:
        If no report was written, the reason and the remedy; otherwise an empty text.
    """
    command = f"gpd report {shlex.quote(short_path(run.folder))}"
    if missing_packages():
        return f"{_INSTALL}, then {command}"
    from gpd_cli.report.page import write_page

    page = run.folder / REPORT
    missing = [f"Accuracy by class, confusions and disagreements: {command}"]
    try:
        write_page([run], {}, [run.lacking, *missing] if run.lacking else missing, page)
    except (GpdError, OSError) as error:  # must not make a successful run fail
        return str(error)
    return ""


def missing_packages() -> list[str]:
    """Names of the packages that a report needs but that are not installed."""
    return [name for name in _PACKAGES if find_spec(name) is None]


def _predictions(runs: Sequence[Run], split: str) -> tuple[dict[str, Predictions], list[str]]:
    """Predictions by the name of the run, and sentences about runs without predictions."""
    predictions: dict[str, Predictions] = {}
    missing: list[str] = []
    if split == "none":
        return predictions, ["Classes and pictures are left out (--split none)."]
    for run in runs:
        checkpoint = run.checkpoint(BEST) or run.checkpoint(LAST)
        without = f"Classes and pictures of {run.name} are left out: "
        if checkpoint is None:
            missing.append(f"{without}the run has no checkpoint.")
            continue
        try:
            predictions[run.name] = predict(checkpoint, split)  # type: ignore[arg-type]
        except Exception as error:  # a user's data code may fail; the rest does not need the data
            missing.append(f"{without}{reason_of(error)}.")
    return predictions, missing
