"""The report as an HTML page, which includes its plots, pictures and the plotting library."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs
from torch import Tensor

from gpd_cli.files import atomic_path
from gpd_cli.package_version import gpd_version
from gpd_cli.report import figures
from gpd_cli.report.predictions import Guess, Picture, Predictions
from gpd_cli.report.run import Run
from gpd_cli.report.summary import Table, caption, confusions, results, scores, settings

_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
_THUMBNAIL = 192  # largest edge of a picture on the page, in pixels
_SMALL = 64  # largest edge, in pixels, of a picture that is stored without loss (PNG)


@dataclass(frozen=True)
class _Card:
    """A picture with its label and the networks' predictions.

    Args:
        source: the picture as a data URI.
        is_small: whether the picture has at most `_SMALL` pixels per edge.
        label: name of the picture's class.
        said: the prediction of each network as a text, by name of the network.
    """

    source: str
    is_small: bool
    label: str
    said: dict[str, str]


@dataclass(frozen=True)
class _Predicted:
    """The part of a page about the predictions of one run.

    Args:
        run: name of the run.
        split: the split of the data set.
        scores: a sentence with the accuracies.
        images: number of images.
        disagreements: number of images on which student and teacher disagree.
        has_teacher: whether there is a dynamic teacher.
        classes: the plot of the accuracy by class.
        left_out: number of classes that the plot leaves out.
        confusions: the table of the most frequent confusions.
        cards: pictures on which student and teacher disagree.
    """

    run: str
    split: str
    scores: str
    images: int
    disagreements: int
    has_teacher: bool
    classes: Markup
    left_out: int
    confusions: Table
    cards: list[_Card]


def write_page(
    runs: Sequence[Run],
    predictions: Mapping[str, Predictions],
    missing: Sequence[str],
    path: Path,
) -> None:
    """Write the page of a report.

    Args:
        runs: the runs to show, at least one.
        predictions: predictions of the run's networks, by name of the run.
        missing: sentences about what the page does not show, with reasons.
        path: path of the file to write.
    """
    # Autoescaping, since names of runs and classes may contain any characters.
    template = Environment(autoescape=True).from_string(
        files("gpd_cli.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    numbers = count()

    def plot(figure: go.Figure) -> Markup:
        html = plotly.io.to_html(
            figure,
            config=_CONFIG,
            include_plotlyjs=False,
            full_html=False,
            div_id=f"figure-{next(numbers)}",
        )
        return Markup(html)  # safe, since plotly escapes the texts in its JSON

    text = template.render(
        title=", ".join(run.name for run in runs),
        subtitle=_subtitle(runs),
        script=Markup(get_plotlyjs()),
        results=results(runs),
        caption=caption(runs),
        accuracy=plot(figures.accuracy_figure(runs)),
        gap=plot(gap) if (gap := figures.gap_figure(runs)).data else None,
        losses={name: plot(figure) for name, figure in figures.loss_figures(runs).items()},
        steps={name: plot(figure) for name, figure in figures.step_figures(runs).items()},
        predicted=[_predicted(name, found, plot) for name, found in predictions.items()],
        missing=missing,
        settings=settings(runs),
        compared=len(runs) > 1,
        version=gpd_version(),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def data_uri(pixels: Tensor) -> str:
    """Encode an image as a data URI, to be included in a page; large images are scaled down.

    Args:
        pixels: an image with values in [0, 1], ``[C, H, W]``; of two channels only the first is
            shown, and of more than three the first three.
    """
    array = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] < 3 else array[..., :3])
    kind = "png" if max(image.size) <= _SMALL else "jpeg"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    told = runs[0].settings
    parts = {
        "": told.get("model.student"),
        "ratio ": told.get("model.ratio"),
        "data ": told.get("data.dataset") or told.get("data"),
        "learning rate ": told.get("model.optimizer.lr"),
    }
    return ", ".join(f"{title}{value}" for title, value in parts.items() if value is not None)


def _predicted(name: str, found: Predictions, plot: object) -> _Predicted:
    figure, left_out = figures.class_figure(found)
    return _Predicted(
        run=name,
        split=found.split,
        scores=scores(found),
        images=len(found.labels),
        disagreements=found.disagreements,
        has_teacher="teacher" in found.chosen,
        classes=plot(figure),  # type: ignore[operator]
        left_out=left_out,
        confusions=confusions(found),
        cards=[_card(picture, found.class_names) for picture in found.pictures],
    )


def _card(picture: Picture, names: Sequence[str]) -> _Card:
    def said(guess: Guess) -> str:
        right = "✓" if guess.label == picture.label else "✗"
        return f"{right} {names[guess.label]} ({guess.probability:.0%})"

    return _Card(
        data_uri(picture.pixels),
        max(picture.pixels.shape[1:]) <= _SMALL,
        names[picture.label],
        {network: said(guess) for network, guess in picture.guesses.items()},
    )
