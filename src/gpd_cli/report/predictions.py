"""Predictions of a run's networks for its validation or test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from gpd_cli.data import ImageData
from gpd_cli.errors import DataError
from gpd_cli.teacher.checkpoint import image_spec, load_networks, read_run
from gpd_cli.teacher.networks import plain_networks

Split = Literal["validation", "test"]
PICTURES = 12
"""Number of images on which student and teacher disagree that a report shows."""


@dataclass(frozen=True)
class Guess:
    """A network's most probable class for an image.

    Args:
        label: number of the class.
        probability: the probability that the network gives to the class.
    """

    label: int
    probability: float


@dataclass(frozen=True)
class Picture:
    """An image that student and teacher disagree on.

    Args:
        number: number of the image within its split, counted from 0.
        pixels: the image with values in [0, 1], ``[C, H, W]``.
        label: class number of the image.
        guesses: the guess of each network, by name of the network.
    """

    number: int
    pixels: Tensor
    label: int
    guesses: dict[str, Guess]

    @property
    def confidence(self) -> float:
        """The product of the probabilities that the networks give to their different classes."""
        product = 1.0
        for guess in self.guesses.values():
            product *= guess.probability
        return product


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions for the images of a split.

    Args:
        split: the split of the data set.
        class_names: names of the classes in the order of class numbers.
        labels: class numbers of the images, ``[N]``.
        chosen: predicted class numbers, ``[N]``, by network: ``student``, and ``teacher`` if there
            is one.
        pictures: the images on which both networks disagree most confidently.
    """

    split: Split
    class_names: list[str]
    labels: Tensor
    chosen: dict[str, Tensor]
    pictures: list[Picture] = field(default_factory=list)

    @property
    def disagreements(self) -> int:
        """The number of images that student and teacher disagree on; 0 without a teacher."""
        if "teacher" not in self.chosen:
            return 0
        return int((self.chosen["student"] != self.chosen["teacher"]).sum())

    def accuracy(self, network: str) -> float:
        """Top-1 accuracy of a network on these images, in percent."""
        return 100 * int((self.chosen[network] == self.labels).sum()) / len(self.labels)


@dataclass(frozen=True)
class Confusion:
    """Images of one class that a network takes for another class.

    Args:
        label: class number of the images.
        chosen: class number that the network predicts.
        count: number of such images.
        share: `count` as a fraction of all images of the class `label`, from 0 to 1.
    """

    label: int
    chosen: int
    count: int
    share: float


def predict(checkpoint: Path, split: Split) -> Predictions:
    """Run the networks of a checkpoint on the images of a split.

    Student and dynamic teacher are run as they would be extracted.

    Args:
        checkpoint: path of a checkpoint of `fit`; the data is opened with the settings of the run.
        split: the images to predict.

    Raises:
        GpdError: when checkpoint or data cannot be read, or the split has no images.
    """
    network, _ = load_networks(checkpoint)
    networks = plain_networks(network)
    data = _data(checkpoint)
    seen = _PredictionCollector(networks, data)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    run = trainer.validate if split == "validation" else trainer.test
    run(seen, datamodule=data, verbose=False)
    if not seen.labels:
        raise DataError(f"There are no {split} images to report on; choose another --split.")
    labels = torch.cat(seen.labels)
    count = max(*seen.widths, int(labels.max()) + 1)
    known = list(getattr(data, "class_names", None) or ())
    # A user's data module may name fewer classes than the networks have.
    names = [*known, *range(len(known), count)]
    chosen = {name: torch.cat(values) for name, values in seen.chosen.items()}
    return Predictions(split, [str(name) for name in names], labels, chosen, seen.pictures)


def class_accuracies(labels: Tensor, chosen: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Accuracy of each class.

    Args:
        labels: class numbers, ``[N]``.
        chosen: predicted class numbers, ``[N]``.
        classes: number of classes.

    Returns:
        Accuracy by class in percent, ``[C]``, NaN for a class without images; and number of images
        by class, ``[C]``.

    Example:
        >>> class_accuracies(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        (tensor([ 50., 100.]), tensor([2, 1]))
    """
    counts = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[labels == chosen], minlength=classes)
    return 100 * hits / counts, counts


def worst_confusions(labels: Tensor, chosen: Tensor, most: int = 12) -> list[Confusion]:
    """The pairs of classes that a network confuses most often, the most frequent first.

    Args:
        labels: class numbers, ``[N]``.
        chosen: predicted class numbers, ``[N]``.
        most: largest number of pairs to return.

    Example:
        >>> worst_confusions(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 1, 0]), most=1)
        [Confusion(label=0, chosen=1, count=2, share=1.0)]
    """
    counts = torch.bincount(labels)
    wrong = labels != chosen
    pairs, times = torch.stack([labels[wrong], chosen[wrong]], 1).unique(dim=0, return_counts=True)
    order = times.argsort(descending=True, stable=True)[:most]
    return [
        Confusion(label, other, int(times[k]), int(times[k]) / int(counts[label]))
        for k in order.tolist()
        for label, other in [pairs[k].tolist()]
    ]


class _PredictionCollector(LightningModule):
    """A module that collects the predictions of networks in validation or test.

    Args:
        networks: the networks by name.
        data: the data module; if it has statistics of normalization, these are used to show images
            as they were before normalization.
    """

    def __init__(self, networks: Mapping[str, nn.Module], data: Any) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(dict(networks))
        self.labels: list[Tensor] = []
        self.chosen: dict[str, list[Tensor]] = {name: [] for name in networks}
        self.pictures: list[Picture] = []
        self.widths: set[int] = set()
        self._statistics = getattr(getattr(data, "preprocessing", None), "statistics", None)
        self._count = 0

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Collect predictions for a batch of validation images."""
        self._take(*batch[:2])

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Collect predictions for a batch of test images."""
        self._take(*batch[:2])

    def _take(self, images: Tensor, labels: Tensor) -> None:
        labels = (labels if labels.ndim == 1 else labels.argmax(dim=1)).cpu()
        tops = {}
        for name, network in self.networks.items():
            probabilities = network(images).float().softmax(dim=1).cpu()
            self.widths.add(probabilities.shape[1])
            tops[name] = probabilities.max(dim=1)
            self.chosen[name].append(tops[name].indices)
        self.labels.append(labels)
        if "teacher" in tops:
            differ = tops["student"].indices != tops["teacher"].indices
            for k in differ.nonzero().flatten().tolist():
                guesses = {
                    name: Guess(int(top.indices[k]), float(top.values[k]))
                    for name, top in tops.items()
                }
                picture = Picture(self._count + k, images[k], int(labels[k]), guesses)
                self.pictures.append(picture)
            self.pictures.sort(key=lambda picture: -picture.confidence)
            self.pictures = [
                p if p.number < self._count else self._shown(p) for p in self.pictures[:PICTURES]
            ]
        self._count += len(labels)

    def _shown(self, picture: Picture) -> Picture:
        """A picture with values in [0, 1]: denormalized, or scaled if mean and std are unknown."""
        pixels = picture.pixels.detach().float().cpu()
        if self._statistics is not None:
            mean, std = (torch.tensor(values)[:, None, None] for values in self._statistics)
            pixels = pixels * std + mean
        else:
            low, high = pixels.amin(), pixels.amax()
            pixels = (pixels - low) / (high - low).clamp(min=1e-12)
        return Picture(picture.number, pixels.clamp(0, 1), picture.label, picture.guesses)


def _data(checkpoint: Path) -> LightningDataModule:
    """The data module of the run that wrote a checkpoint, with classes numbered as in training."""
    content = read_run(checkpoint)
    settings = content.get("datamodule_hyper_parameters", {})
    path = settings.get("_class_path")
    cls: Any = ImageData if path is None else locate(path)
    if cls is None:
        raise DataError(
            f"The class {path} of the run's data cannot be imported; install its package, or put "
            "the folder of its module on PYTHONPATH."
        )
    arguments = {name: value for name, value in settings.items() if not name.startswith("_")}
    trained = image_spec(content)
    if trained is not None and cls is ImageData:
        arguments["root"] = trained.present_root(arguments.get("root"))
    data: Any = cls(**arguments)
    if trained is not None and hasattr(data, "follow"):
        data.follow(trained)  # number classes by name, since the folders may have changed
    return data  # type: ignore[no-any-return]
