"""Figure of a run: accuracy of student and teacher, and the gap, over epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpd_cli.files import atomic_path

_COLOURS = {"student": "tab:blue", "teacher": "tab:orange"}


def plot_gap(epochs: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """Draw the accuracies in an upper plot and the gap in a lower one, and save them as PNG.

    Args:
        epochs: by epoch (counted from 0), the values by name, such as ``val/student_top1`` in
            percent and ``val/gap`` in points; accuracies of static teachers are drawn as horizontal
            lines.
        path: path of the PNG file to write.
    """
    # A figure made without pyplot needs no display and leaves no global state.
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, gap = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for stage, style in (("train", "--"), ("val", "-")):
        for network, colour in _COLOURS.items():
            _line(accuracy, epochs, f"{stage}/{network}_top1", f"{network}, {stage}", style, colour)
        _line(gap, epochs, f"{stage}/gap", stage, style, "tab:green")
    for name, value in static_teachers(epochs).items():
        accuracy.axhline(value, color="tab:red", linestyle="-" if name == "static" else ":")
        accuracy.lines[-1].set_label(f"{name.replace('_', ' ')}, val")
    accuracy.set_ylabel("top-1 accuracy (%)")
    gap.set_ylabel("gap (points)")
    gap.axhline(0, color="grey", linewidth=0.8)
    gap.set_xlabel("epoch")
    for axes in (accuracy, gap):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def static_teachers(epochs: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The latest accuracy of each static teacher, in percent, by name (``static``).

    Args:
        epochs: values by epoch as for `plot_gap`; accuracies of static teachers have names such as
            ``val/static_top1`` and ``val/assistant_1_top1``.
    """
    networks = {f"{network}_top1" for network in _COLOURS}
    return {
        name.removesuffix("_top1"): value
        for _, values in sorted(epochs.items())
        for key, value in values.items()
        for stage, _, name in [key.partition("/")]
        if stage == "val" and name.endswith("_top1") and name not in networks
    }


def _line(
    axes: object,
    epochs: Mapping[int, Mapping[str, float]],
    key: str,
    label: str,
    style: str,
    colour: str,
) -> None:
    points = [(epoch + 1, values[key]) for epoch, values in sorted(epochs.items()) if key in values]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label)  # type: ignore[attr-defined]
