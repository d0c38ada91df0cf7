"""How a run is scored: the networks as they would be extracted, on validation and test images."""

from __future__ import annotations

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from gpd_cli.expansion import Pair, merged_teacher
from gpd_cli.training.metrics import Scores
from gpd_cli.training.networks import Alone


class EvaluatedModule(LightningModule):
    """Validation, test and prediction of a student and of its dynamic teacher, if it has one.

    Args:
        network: what is trained.
        num_classes: number of classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Pair | Alone
        self._plain: dict[str, nn.Module] = {}  # a dictionary, which Module does not look into

    def score(self, num_classes: int) -> None:
        """Make the scores.

        Args:
            num_classes: number of classes.
        """
        names = ("student", "teacher") if isinstance(self.network, Pair) else ("student",)
        self.train_scores = Scores(names, num_classes)
        self.val_scores = Scores(names, num_classes)
        self.test_scores = Scores(names, num_classes)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score both networks on validation images."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score both networks on test images."""
        self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities of student and dynamic teacher, ``[B, C]`` each."""
        logits = self._plain_logits(batch[0])
        return {name: value.float().softmax(dim=1).cpu() for name, value in logits.items()}

    def on_validation_epoch_start(self) -> None:
        """Cut the networks to score."""
        self._cut()

    def on_test_epoch_start(self) -> None:
        """Cut the networks to score."""
        self._cut()

    def on_predict_epoch_start(self) -> None:
        """Cut the networks to run."""
        self._cut()

    def on_validation_epoch_end(self) -> None:
        """Log accuracies and the gap."""
        self.log_scores("val")
        self._plain = {}

    def on_test_epoch_end(self) -> None:
        """Log accuracies and the gap."""
        self.log_scores("test")
        self._plain = {}

    def on_predict_epoch_end(self) -> None:
        """Drop what was cut."""
        self._plain = {}

    def log_batch(
        self, stage: str, logits: dict[str, Tensor], terms: dict[str, Tensor], labels: Tensor
    ) -> None:
        """Log a batch's losses and count its hits.

        Args:
            stage: train, val or test.
            logits: per network, ``[B, C]``.
            terms: of the loss, by name.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.
        """
        losses = {f"{stage}/loss_{name}": term for name, term in terms.items()}
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        self._scores(stage).update(logits, labels)

    def log_scores(self, stage: str) -> None:
        """Log an epoch's accuracies and the gap, and count from zero.

        Args:
            stage: train, val or test.
        """
        scores = self._scores(stage)
        values = {f"{stage}/{name}": value for name, value in scores.compute().items()}
        # Every process has the same values already: the metrics are synchronized.
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)
        scores.reset()

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self._plain_logits(images)
        terms = {f"{name}_ce": F.cross_entropy(value, labels) for name, value in logits.items()}
        self.log_batch(stage, logits, terms, labels)

    def _cut(self) -> None:
        """Take out the plain networks: what is scored is what is extracted, and merged once."""
        self._plain = {"student": self.network.extract().eval()}
        if isinstance(self.network, Pair):
            self._plain["teacher"] = merged_teacher(self.network).eval()

    def _plain_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {name: network(images) for name, network in self._plain.items()}

    def _scores(self, stage: str) -> Scores:
        return {"train": self.train_scores, "val": self.val_scores, "test": self.test_scores}[stage]
