"""Validation, test and prediction, with networks extracted as `gpd extract` extracts them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from gpd_cli.data import ImageData
from gpd_cli.distill.precision import cross_entropy
from gpd_cli.errors import DataError
from gpd_cli.teacher.networks import Alone, plain_networks
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.averages import find_averager, has_begun, trained_weights
from gpd_cli.training.metrics import Scores


class EvaluatedModule(LightningModule):
    """Validation, test and prediction of a student and of its dynamic teacher, if there is one.

    If the run keeps an average of its weights, and the average has begun, validation scores the
    averaged networks, and beside them the trained networks, which are logged as ``raw``. Subclasses
    set the attribute ``network``, and call `make_scores` with the number of classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Pair | Alone
        # Networks to evaluate, by name. In plain dictionaries, Module does not register them.
        self._plain: dict[str, nn.Module] = {}
        self._raw: dict[str, nn.Module] = {}

    def make_scores(self, num_classes: int) -> None:
        """Create the accuracy metrics of training, validation and test.

        Args:
            num_classes: number of classes.
        """
        names = ("student", "teacher") if isinstance(self.network, Pair) else ("student",)
        self.train_scores = Scores(names, num_classes)
        self.val_scores = Scores(names, num_classes)
        self.raw_scores = Scores(names, num_classes)
        self.test_scores = Scores(names, num_classes)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score the networks on a batch of validation images."""
        self._evaluate("val", batch)
        if self._raw:
            self.raw_scores.update(_logits(self._raw, batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score the networks on a batch of test images."""
        self._evaluate("test", batch)

    def predict_step(
        self, batch: Tensor | Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Class probabilities by network, ``[B, C]`` each: ``student``, and ``teacher`` if any.

        Args:
            batch: images, ``[B, C, H, W]``, or a sequence that begins with them.
            batch_idx: number of the batch.
            dataloader_idx: number of its loader; several are refused when prediction starts.
        """
        logits = _logits(self._plain, batch if isinstance(batch, Tensor) else batch[0])
        return {name: value.float().softmax(dim=1).cpu() for name, value in logits.items()}

    def on_validation_epoch_start(self) -> None:
        """Extract the networks to score, after Lightning has put the average into the module."""
        self._plain = plain_networks(self.network)
        averager = find_averager(self.trainer)
        if averager is not None and has_begun(averager):
            with trained_weights(averager, self):
                self._raw = plain_networks(self.network)

    def on_test_epoch_start(self) -> None:
        """Extract the networks to score."""
        self._plain = plain_networks(self.network)

    def on_predict_epoch_start(self) -> None:
        """Extract the networks to run."""
        self._plain = plain_networks(self.network)

    def on_validation_epoch_end(self) -> None:
        """Log accuracies and the gap."""
        self.log_scores("val")
        if self._raw:
            self._log_scores("val/raw_", self.raw_scores)
        self._plain, self._raw = {}, {}

    def on_test_epoch_end(self) -> None:
        """Log accuracies and the gap."""
        self.log_scores("test")
        self._plain = {}

    def on_predict_epoch_end(self) -> None:
        """Drop the extracted networks."""
        self._plain = {}

    def log_batch(
        self, stage: str, logits: dict[str, Tensor], terms: dict[str, Tensor], labels: Tensor
    ) -> None:
        """Log the losses of a batch, and count its correct predictions.

        Args:
            stage: train, val or test.
            logits: logits by network, ``[B, C]`` each.
            terms: terms of the loss by name, scalars.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.
        """
        losses = {f"{stage}/loss_{name}": term for name, term in terms.items()}
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        self._scores(stage).update(logits, labels)

    def log_scores(self, stage: str) -> None:
        """Log an epoch's accuracies and the gap, and reset the metrics.

        Args:
            stage: train, val or test.

        Raises:
            DataError: when no process had an image.
        """
        self._log_scores(f"{stage}/", self._scores(stage))

    def _log_scores(self, prefix: str, scores: Scores) -> None:
        # A stream may turn out to be empty, and metrics of no image would be 0 %.
        if not self.trainer.strategy.reduce_boolean_decision(scores.has_images, all=False):
            raise no_images(self.trainer, prefix.partition("/")[0])
        values = {f"{prefix}{name}": value for name, value in scores.compute().items()}
        # The metrics are synchronized, so that all processes have the same values already.
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)
        scores.reset()

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = _logits(self._plain, images)
        terms = {f"{name}_ce": cross_entropy(value, labels) for name, value in logits.items()}
        self.log_batch(stage, logits, terms, labels)

    def _scores(self, stage: str) -> Scores:
        return {"train": self.train_scores, "val": self.val_scores, "test": self.test_scores}[stage]


def no_images(trainer: Trainer, stage: str) -> DataError:
    """Make the error for an epoch without a single image.

    Args:
        trainer: the trainer, whose data it is.
        stage: train, val or test.
    """
    limit = f"check --trainer.limit_{stage}_batches"
    if isinstance(trainer.datamodule, ImageData):  # type: ignore[attr-defined]
        return DataError(
            f"The data has no image in the split of --data.{stage}_split; name another split, or "
            f"{limit}."
        )
    return DataError(f"{stage}_dataloader of the data gave no image; correct it, or {limit}.")


def _logits(networks: dict[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    return {name: network(images) for name, network in networks.items()}
