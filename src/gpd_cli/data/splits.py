"""The splits of a data set that a run uses, and the numbering of their classes."""

from __future__ import annotations

from functools import cached_property

from lightning.pytorch.utilities import rank_zero_info

from gpd_cli.data.feed import Subset
from gpd_cli.data.image_spec import ImageSpec
from gpd_cli.data.opening import DataSpec, MissingSplitError, numbered
from gpd_cli.data.sources import Source, hold_out
from gpd_cli.errors import DataError

WHERE_PRESENT = "validation"
"""The split to validate on that need not exist; training images are then held out instead."""


class Splits:
    """The splits that a run uses, each opened once, when it is needed first.

    Args:
        spec: the data set.
        mode: Pillow's mode of the images, L or RGB.
        train_split: name of the split to train on.
        val_split: name of the split to validate on; None to hold out training images.
        test_split: name of the split to test on.
        val_fraction: fraction of the training images to hold out.
        seed: seed of the choice of held-out images.
    """

    def __init__(
        self,
        spec: DataSpec,
        mode: str,
        *,
        train_split: str,
        val_split: str | None,
        test_split: str,
        val_fraction: float,
        seed: int,
    ) -> None:
        self.spec, self._mode = spec, mode
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.val_fraction, self.seed = val_fraction, seed
        self._trained: ImageSpec | None = None

    def follow(self, trained: ImageSpec) -> None:
        """Number the classes as a trained network does.

        Args:
            trained: classes and preprocessing from the network's checkpoint.
        """
        self._trained = trained

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers."""
        known = self.known_names
        return self.training.class_names if known is None else known

    @property
    def known_names(self) -> list[str] | None:
        """Class names from the checkpoint of a trained network, with numbers for missing names.

        None if the checkpoint knows neither names nor number of the classes.
        """
        trained = self._trained or ImageSpec()
        if trained.class_names is not None:
            return list(trained.class_names)
        return None if trained.classes is None else numbered(trained.classes)

    @property
    def is_named(self) -> bool:
        """Whether the classes have names of their own, and not just their numbers."""
        if self._trained is None or self.known_names is None:
            return self.training.named
        return self._trained.class_names is not None

    @cached_property
    def training(self) -> Source:
        """The training split."""
        source = self._open(self.train_split, training=True)
        if self._trained is not None and self._trained.class_names is not None:
            self._renumber(source, f"Split '{self.train_split}'")
        return source

    @cached_property
    def test(self) -> Subset:
        """The test images."""
        source = self._checked(self.test_split)
        if source.draw is not None:
            self._remark_on_another(source.draw)
        return Subset(source)

    @cached_property
    def pictures(self) -> Subset:
        """The images to predict."""
        split = self.test_split
        trained_on = None if self._trained is None else self._trained.root
        found = self.spec.pictures(split, self.class_names, trained_on)
        return Subset(self.test.source if found is None else found, unlabelled=True)

    @cached_property
    def validation(self) -> Subset | None:
        """The validation images, or None if there are none.

        The training split is opened only if the validation images are a part of it.
        """
        split = self.val_split
        if split is not None:
            try:
                return Subset(self._checked(split))
            except MissingSplitError:
                if split != WHERE_PRESENT:
                    raise
        held_out = self._held_out[1]
        if held_out is not None:
            self._remark_on_another(self._draw_of_training)
        return held_out

    @property
    def draw(self) -> str | None:
        """Digest of the random choice of held-out images; None if none are held out at random."""
        training, _ = self.fit_subsets
        is_part = training.source.draw is not None or training.indices is not None
        return self._draw_of_training if is_part else None

    @cached_property
    def _draw_of_training(self) -> str | None:
        return self.training.draw or self.training.draw_of(self.val_fraction, self.seed)

    def _remark_on_another(self, draw: str | None) -> None:
        """Tell the user if other images are held out now than when the network was trained.

        Args:
            draw: digest of the choice of held-out images as it is now.
        """
        if self._trained is None or self._trained.draw in (None, draw):
            return
        rank_zero_info(
            f"'{self.spec.root}' has other images than in training, or --data.val_fraction or "
            "--data.seed is another, so that other images are held out: some of those that are "
            "scored may have been trained on. Restore images and settings, or score new images, a "
            "folder as a whole by --data.test_split all."
        )

    @cached_property
    def fit_subsets(self) -> tuple[Subset, Subset | None]:
        """The images to train on, and the images to validate on (None if there are none)."""
        whole, validation = Subset(self.training), self.validation
        if validation is None or validation.source is not self.training:
            return whole, validation
        return self._held_out

    @cached_property
    def _held_out(self) -> tuple[Subset, Subset | None]:
        """The training split, divided into images to train on and images held out (or None)."""
        fraction = self.val_fraction
        if fraction == 0:
            return Subset(self.training), None
        remedy = "add images, change --data.val_fraction, or name a split with --data.val_split"
        kept, held_out = hold_out(
            self.training, fraction, self.seed, purpose="validation", remedy=remedy
        )
        rank_zero_info(
            f"{len(held_out)} of the {len(kept) + len(held_out)} training images are held out for "
            "validation."
        )
        return Subset(self.training, kept), Subset(self.training, held_out)

    def fetch(self, split: str | None) -> bool:
        """Download a split, and return whether it exists.

        That a split is missing is no error here; the command that needs the split reports it.
        """
        if split is None:
            return False
        try:
            self._open(split)
        except MissingSplitError:
            return False
        return True

    def _open(self, split: str, training: bool = False) -> Source:
        return self.spec.open(split, mode=self._mode, training=training)

    def _checked(self, split: str) -> Source:
        """Open a split, and number its classes as in training.

        Raises:
            DataError: when the split has a class that is not among those of training.
        """
        source = self._open(split)
        self._renumber(source, f"Split '{split}'")
        return source

    def _renumber(self, source: Source, what: str) -> None:
        found, names = len(source.class_names), self.class_names
        both_named = source.named and self.is_named
        # Folders that are named by class numbers have other positions than their numbers: 1, 10, 2.
        if not both_named and not set(source.class_names) <= set(names):
            if found != len(names):
                raise DataError(
                    f"{what} has {found} classes but the training images have {len(names)}, and "
                    "not all class names are known; give both the same classes."
                )
            named = source.class_names if source.named else names
            listed = ", ".join(f"{number} is {name}" for number, name in enumerate(named[:3]))
            rank_zero_info(
                f"{what} and the training images do not both name their classes, which are matched "
                f"by position: {listed}{', ...' if len(named) > 3 else ''}."
            )
            return
        unknown = source.renumber(names)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            listed = ", ".join(f"'{name}'" for name in unknown[:3])
            known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise DataError(
                f"{what} has classes that the training images do not have: {listed}{more} (those "
                f"of training are {known}); rename them as in training, or remove them."
            )
        if found < len(names):
            rank_zero_info(f"{what} has images of {found} of the {len(names)} classes.")
