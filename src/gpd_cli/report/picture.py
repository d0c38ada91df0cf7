"""The picture of a report, for places that cannot show a page.

It has plots of accuracy, gap, loss and learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpd_cli.files import atomic_path
from gpd_cli.report.run import Run

_STYLES = {"student": "-", "teacher": "--", "static": ":"}


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw runs, each in its own colour, and save the picture as PNG.

    Accuracy and gap are those of validation, or of training for a run without validation.

    Args:
        runs: the runs to draw, at least one.
        path: path of the PNG file to write.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (accuracy, gap), (loss, rate) = figure.subplots(2, 2)
    for k, run in enumerate(runs):
        colour = f"C{k}"
        stage = "train" if run.best_epoch is None else "val"
        name = _text(run.name)
        prefix = "" if len(runs) == 1 else f"{name}: "
        for network, style in _STYLES.items():
            _line(accuracy, run, f"{stage}/{network}_top1", f"{prefix}{network}", style, colour)
        _line(gap, run, f"{stage}/gap", name, "-", colour)
        _line(loss, run, "train/loss_total", name, "-", colour)
        rows = [row for row in run.steps if "lr" in row and "step" in row]
        if rows:
            steps, rates = [row["step"] + 1 for row in rows], [row["lr"] for row in rows]
            rate.plot(steps, rates, color=colour, label=name)
    titles = {"top-1 accuracy (%)": accuracy, "gap (points)": gap, "loss, training": loss}
    for title, axes in titles.items():
        axes.set(title=title, xlabel="epoch")
    rate.set(title="learning rate", xlabel="step")
    for axes in (accuracy, gap, loss, rate):
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _text(name: str) -> str:
    r"""Make matplotlib show a name unchanged.

    Matplotlib would take text between dollars for formulas, and hide labels that begin with ``_``.

    Example:
        >>> print(_text("a_$x$"), _text("_old"), sep=",")
        a_\$x\$, _old
    """
    text = name.encode(errors="backslashreplace").decode().replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text


def _line(axes: Any, run: Run, name: str, label: str, style: str, colour: str) -> None:
    epochs, values = run.curve(name)
    if values:
        marker = "" if len(values) > 1 else "o"
        axes.plot(epochs, values, style, marker=marker, color=colour, label=label)
