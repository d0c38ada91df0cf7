"""Settings for mixup and CutMix of training batches."""

from __future__ import annotations

from dataclasses import dataclass

from timm.data import Mixup

from gpd_cli.errors import DataError


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), by timm.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: alpha of CutMix's Beta distribution; 0 for none.
        mixup_prob: fraction of the batches that are mixed.
        switch_prob: fraction of the mixed batches that get CutMix, if both are on.
        batch_size: number of images per batch.

    Raises:
        DataError: when a value is out of range, or the batch size is odd, so that the images of a
            batch cannot be paired.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    switch_prob: float = 0.5
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise DataError(f"--data.{name} must be 0 or more, not {getattr(self, name)}.")
        for name in ("mixup_prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"--data.{name} must be in [0, 1], not {getattr(self, name)}.")
        if self.active and self.batch_size % 2:
            raise DataError(
                "Mixup and CutMix mix images in pairs; set --data.batch_size to an even number, "
                f"not {self.batch_size}."
            )

    @property
    def active(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0

    def build(self, num_classes: int) -> Mixup:
        """Build timm's `Mixup`, which mixes a batch in place; labels become ``[B, num_classes]``.

        Args:
            num_classes: number of classes.
        """
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.switch_prob,
            # Labels are smoothed in the loss, which gives the same: smoothing a mixture of labels
            # equals mixing smoothed labels.
            label_smoothing=0.0,
            num_classes=num_classes,
        )
