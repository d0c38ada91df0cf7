"""The interactive figures of a report, made with plotly."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from gpd_cli.report.predictions import Predictions, class_accuracies
from gpd_cli.report.run import Run

_NETWORKS = {"student": "#1f77b4", "teacher": "#ff7f0e", "static": "#d62728"}
_GAP = "#2ca02c"
_RUNS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#a6761d", "#e7298a", "#17becf", "#666666")
_DASHES = {"student": "solid", "teacher": "dash", "static": "dot"}
_TERMS = {
    "student_ce": "student, from labels",
    "teacher_ce": "dynamic teacher, from labels",
    "gap": "student, from dynamic teacher",
    "student_static": "student, from static teacher",
    "teacher_static": "dynamic teacher, from static teacher",
    "total": "sum",
}
_TALL, _LOW = 360, 240  # heights of figures in pixels
_MOST_CLASSES = 40  # largest number of classes in the figure of accuracy by class
_LONGEST = 28  # largest number of letters in a class name


def accuracy_figure(runs: Sequence[Run]) -> go.Figure:
    """Top-1 accuracy of student, dynamic teacher and static teacher over epochs.

    A single run is shown with validation and training accuracy, and a colour for each network.
    Several runs are shown with validation accuracy only (training accuracy for a run without
    validation), and a colour for each run.
    """
    figure = _figure("epoch", "top-1 accuracy (%)", _TALL)
    for k, run in enumerate(runs):
        for network, dash in _DASHES.items():
            for stage in ("val", "train"):
                epochs, values = run.curve(f"{stage}/{network}_top1")
                if not values or (stage == "train" and len(runs) > 1 and _validated(run)):
                    continue
                alone = len(runs) == 1
                title = f"{network}, {stage}" if alone else f"{run.name}: {network}"
                line = {
                    "color": _NETWORKS[network] if alone else _colour(k),
                    "dash": _DASHES["static" if network == "static" else "student"]
                    if alone
                    else dash,
                    "width": 2,
                }
                figure.add_scatter(
                    x=epochs,
                    y=values,
                    name=_text(title),
                    mode=_mode(values),
                    line=line,
                    opacity=0.45 if stage == "train" else 1,
                )
    return figure


def gap_figure(runs: Sequence[Run]) -> go.Figure:
    """The gap, teacher's accuracy minus student's in points, over epochs."""
    figure = _figure("epoch", "gap (points)", _LOW)
    for k, run in enumerate(runs):
        for stage in ("val", "train"):
            epochs, values = run.curve(f"{stage}/gap")
            if not values or (stage == "train" and len(runs) > 1 and _validated(run)):
                continue
            figure.add_scatter(
                x=epochs,
                y=values,
                name=stage if len(runs) == 1 else _text(run.name),
                mode=_mode(values),
                line={"color": _GAP if len(runs) == 1 else _colour(k)},
                opacity=0.45 if stage == "train" else 1,
            )
    figure.add_hline(y=0, line_color="#999", line_width=1)
    return figure


def loss_figures(runs: Sequence[Run]) -> dict[str, go.Figure]:
    """A figure of each term of the loss over epochs, by title, with the sum of all terms last."""
    names = {
        name.partition("/loss_")[2]
        for run in runs
        for stage in ("train", "val")
        for name in run.names(f"{stage}/loss_")
    }
    figures = {}
    known = [term for term in _TERMS if term in names and term != "total"]
    total = ["total"] if "total" in names else []
    for term in [*known, *sorted(names - set(_TERMS)), *total]:
        figure = _figure("epoch", "", _LOW)
        for k, run in enumerate(runs):
            for stage, dash in (("train", "solid"), ("val", "dash")):
                epochs, values = run.curve(f"{stage}/loss_{term}")
                if values:
                    figure.add_scatter(
                        x=epochs,
                        y=values,
                        name=stage if len(runs) == 1 else _text(f"{run.name}: {stage}"),
                        mode=_mode(values),
                        line={"color": _colour(k), "dash": dash},
                    )
        figures[_TERMS.get(term, term.replace("_", " "))] = figure
    return figures


def step_figures(runs: Sequence[Run]) -> dict[str, go.Figure]:
    """Figures of learning rate, throughput and gradient norm over steps, by title."""
    titles = {
        "lr": "learning rate",
        "images_per_second": "images per second",
        "grad_norm": "gradient norm",
    }
    figures = {}
    for name, title in titles.items():
        figure = _figure("step", "", _LOW)
        for k, run in enumerate(runs):
            rows = [row for row in run.steps if name in row and "step" in row]
            if rows:
                figure.add_scatter(
                    x=[int(row["step"]) + 1 for row in rows],
                    y=[row[name] for row in rows],
                    name=_text(run.name),
                    mode=_mode(rows),
                    line={"color": _colour(k)},
                )
        if name != "lr":
            figure.update_yaxes(rangemode="tozero")
        figure.update_layout(showlegend=len(runs) > 1)
        if figure.data:
            figures[title] = figure
    return figures


def class_figure(predictions: Predictions) -> tuple[go.Figure, int]:
    """Accuracy of student and teacher by class, beginning with the student's worst class.

    Returns:
        The figure, and the number of classes that it leaves out; these are the ones that the
        student recognizes best.
    """
    names = predictions.class_names
    accuracies = {
        network: class_accuracies(predictions.labels, chosen, len(names))
        for network, chosen in predictions.chosen.items()
    }
    values, counts = accuracies["student"]
    order = [k for k in values.argsort(stable=True).tolist() if counts[k]]
    shown = order[:_MOST_CLASSES]
    short = [_short(names[k]) for k in shown]
    titles = short if len(set(short)) == len(short) else [names[k] for k in shown]
    figure = _figure("accuracy (%)", "", 110 + 24 * len(shown))
    for network, (percent, _) in accuracies.items():
        figure.add_scatter(
            x=[round(float(percent[k]), 2) for k in shown],
            y=[_text(title) for title in titles],
            customdata=[int(counts[k]) for k in shown],
            hovertemplate="%{y}: %{x} % of %{customdata} images",
            name=network,
            mode="markers",
            marker={
                "color": _NETWORKS[network],
                "size": 11 if network == "student" else 9,
                "symbol": "circle" if network == "student" else "diamond-open",
                "line": {"width": 2 if network != "student" else 0},
            },
        )
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(range=[-3, 103])
    figure.update_yaxes(autorange="reversed", type="category", tickmode="linear")
    return figure, len(order) - len(shown)


def _figure(x: str, y: str, height: int) -> go.Figure:
    """An empty figure for narrow screens: the legend is above, and dragging scrolls the page.

    Args:
        x: title of the horizontal axis.
        y: title of the vertical axis.
        height: height of the figure in pixels.
    """
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1c2733"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "left", "x": 0},
        hovermode="x unified",
        dragmode=False,
        showlegend=True,
    )
    figure.update_xaxes(title_text=x, automargin=True)
    figure.update_yaxes(title_text=y or None, automargin=True)
    return figure


def _validated(run: Run) -> bool:
    return run.best_epoch is not None


def _mode(values: Sequence[object]) -> str:
    """Plotly's mode for a curve: a line, or a marker for a single point, which has no line."""
    return "lines" if len(values) > 1 else "markers"


def _colour(run: int) -> str:
    return _RUNS[run % len(_RUNS)]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _text(name: str) -> str:
    """Escape a name so that plotly shows it unchanged and does not take it for HTML."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
