"""The LightningDataModule for all image data: settings, and loaders of the splits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from timm.data import Mixup
from torch import Tensor

from gpd_cli.data.cached import Cache, check_cacheable
from gpd_cli.data.digits import ignored_settings
from gpd_cli.data.feed import Batches, Feed
from gpd_cli.data.image_spec import ImageSpec
from gpd_cli.data.loaders import LoaderSettings
from gpd_cli.data.mixing import Mixing
from gpd_cli.data.opening import DataSpec, resolved_name
from gpd_cli.data.samplers import Share
from gpd_cli.data.splits import WHERE_PRESENT, Splits
from gpd_cli.data.transforms import Erasing, Interpolation, Preprocessing
from gpd_cli.errors import DataError, no_effect

_MOST_REPEATS = 64


class ImageData(LightningDataModule):
    """Images with class numbers, by timm's readers and transforms.

    Checkpoints should be chosen on validation images, and scored once on test images. If a data set
    has no validation split, a part of the training images is held out, the same in every run. The
    order of the training images depends on global seed and epoch only, so that a resumed run sees
    the images in the same order as an uninterrupted run.

    Args:
        dataset: name of the data set: digits (scikit-learn's 1,797 handwritten digits, nothing to
            download), folder (a tree root/SPLIT/CLASS/IMAGE, or root/CLASS/IMAGE, which is divided
            into splits automatically; also assumed if there is a root and no dataset), or any data
            set of timm: torch/cifar10, torch/cifar100, hfds/NAME (Hugging Face), hfids/NAME
            (streamed), tfds/NAME, wds/NAME (WebDataset).
        root: folder of the data set.
        train_split: split to train on; for wds/ without _info.json the shards and the number of
            images, such as train-{0000..0145}.tar|1281167.
        val_split: split to validate on; if the data set has no split "validation", or if this is
            null, val_fraction of the training images is held out instead.
        test_split: split for the commands test and predict; all takes every image of a folder
            without splits, and, to predict, every image of any folder.
        val_fraction: fraction of every class of the training images to hold out for validation; 0
            trains on all images, without validation. If a folder has no splits, the same fraction
            of all images is first kept for testing.
        classes: number of classes, for a data set that does not name its classes.
        train_samples: number of training images, for a stream that does not state this number.
        input_key: column with the images, if it does not have the usual name.
        target_key: column with the labels, if it does not have the usual name.
        download: download the data set to root if it is missing.
        image_size: height and width of the network's images, in pixels.
        in_chans: number of channels of the network's images, 1 (grey) or 3 (RGB), to which all
            images are converted; by default 1 for digits and 3 for all other data sets.
        mean: mean of each channel for normalization, for values in [0, 1]; by default ImageNet's
            for RGB and 0.5 for grey.
        std: standard deviation of each channel for normalization, for values in [0, 1]; by default
            ImageNet's for RGB and 0.5 for grey.
        interpolation: interpolation for resizing.
        crop_pct: in evaluation, the fraction of the resized image's edge that the center crop keeps
            (0.875 resizes to 256 and crops 224); 1.0 for small images that fill the frame, such as
            CIFAR.
        no_aug: train without augmentation, with resizing and center crop only.
        scale: least and greatest area of the random crop, as fractions of the image's area.
        ratio: least and greatest aspect ratio of the random crop.
        crop_padding: number of pixels by which images are padded on each side before they are
            cropped at random, in place of the random resized crop (4 for CIFAR); 0 for the random
            resized crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength of random changes of brightness, contrast and saturation (0.4 is
            common); timm ignores it if auto_augment is set.
        auto_augment: augmentation policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or
            original.
        re_prob: probability of random erasing.
        re_mode: what fills an erased rectangle: noise (pixel), one random colour (rand), or the
            mean colour (const).
        re_count: largest number of erased rectangles per image.
        mixup: strength (alpha) of mixup; with mixup or cutmix, training labels are soft.
        cutmix: strength (alpha) of CutMix; with both mixup and cutmix, each batch gets one of them.
        mixup_prob: fraction of the batches that are mixed.
        switch_prob: fraction of the mixed batches that get CutMix, if both are on.
        aug_repeats: number of times that each image of an epoch comes, augmented anew each time
            (repeated augmentation, 3 in DeiT); the epoch then has this many times fewer different
            images; 0 for no repetition.
        cache: hold the decoded images of a small data set in memory or on the training device, and
            augment them there in batches; then the only augmentations are pad-and-crop, flip and
            mixing.
        batch_size: number of images per batch and process.
        num_workers: number of loader workers per training process; by default the cores of the
            machine divided by its training processes, and at most 8 (digits need none).
        prefetch_factor: number of batches that each loader worker loads in advance.
        persistent_workers: keep loader workers between epochs.
        pin_memory: load into page-locked memory; by default only if there is a GPU.
        seed: seed of the choice of held-out images, which depends on nothing else.
    """

    # Whether training batches end with the numbers of their images, for distillation methods that
    # keep a memory of every image. To be set before the loaders are made.
    with_indices: bool = False

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        train_split: str = "train",
        val_split: str | None = WHERE_PRESENT,
        test_split: str = "test",
        val_fraction: float = 0.1,
        classes: int | None = None,
        train_samples: int | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        download: bool = False,
        image_size: int = 32,
        in_chans: Literal[1, 3] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: Interpolation = "bilinear",
        crop_pct: float = 0.875,
        no_aug: bool = False,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop_padding: int = 0,
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        re_mode: Erasing = "pixel",
        re_count: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        switch_prob: float = 0.5,
        aug_repeats: int = 0,
        cache: Cache = "none",
        batch_size: int = 128,
        num_workers: int | None = None,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Without logging: `SaveConfig` logs all settings, and the model has a setting `ratio`, too.
        self.save_hyperparameters(logger=False)
        if root is not None and resolved_name(dataset, root) != dataset:
            rank_zero_info(f"'{root}' is read as an image folder (--data.dataset folder).")
        self.hparams["dataset"] = resolved_name(dataset, root)
        given = dict(self.hparams)
        if not 0 <= val_fraction < 1:
            raise DataError(f"--data.val_fraction must be in [0, 1), not {val_fraction}.")
        self.mixing = Mixing(**_fields(Mixing, given))
        self.settings = LoaderSettings(**_fields(LoaderSettings, given))
        self.spec = DataSpec(**_fields(DataSpec, given))
        given["in_chans"] = in_chans or self.spec.in_chans
        given |= {"mean": tuple(mean) if mean else None, "std": tuple(std) if std else None}
        self.preprocessing = Preprocessing(**_fields(Preprocessing, given))
        if cache != "none":
            check_cacheable(self.spec, self.preprocessing)
        if aug_repeats and self.spec.is_streamed:
            raise DataError("--data.aug_repeats must be 0 for a streamed data set.")
        if not 0 <= aug_repeats <= _MOST_REPEATS:
            raise DataError(
                f"--data.aug_repeats must be from 0 to {_MOST_REPEATS}, not {aug_repeats}."
            )
        if not 0 <= seed < 2**32:
            raise DataError(f"--data.seed must be from 0 to 2^32 - 1, not {seed}.")
        self._splits = Splits(
            self.spec,
            self.preprocessing.mode,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            val_fraction=val_fraction,
            seed=seed,
        )

    def follow(self, trained: ImageSpec) -> None:
        """Number the classes as a trained network does, to evaluate this network.

        The training images are then not needed to number the classes.

        Args:
            trained: classes and preprocessing from the network's checkpoint. If it has no class
                names, the classes are named by their numbers; if it does not even have the number
                of classes, the names are those of the training images.
        """
        self._splits.follow(trained)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers."""
        return self._splits.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes. The training split is opened for this if it is necessary."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the network's images, ``(C, H, W)``."""
        size = self.preprocessing.image_size
        return self.preprocessing.in_chans, size, size

    @property
    def image_spec(self) -> ImageSpec:
        """Description of classes and preprocessing, which checkpoints of a trained network hold."""
        names = self.class_names if self._splits.is_named else None
        return ImageSpec.of_settings(self.hparams, names, self._splits.draw)

    @property
    def num_train(self) -> int:
        """The number of training images over all processes, without images that are held out.

        Raises:
            DataError: for a streamed data set, whose number of images is not known.
        """
        return self._splits.fit_subsets[0].count

    def prepare_data(self) -> None:
        """Download the splits that the command will open; Lightning calls this once per machine.

        For fit, the test images are downloaded as well.

        Raises:
            DataError: when a split that the command needs cannot be downloaded.
        """
        if not self.spec.is_downloaded:
            return
        train, validation, test = (self.hparams[f"{k}_split"] for k in ("train", "val", "test"))
        command = None if self.trainer is None else self.trainer.state.fn
        if command in (None, "fit"):
            self._splits.fetch(train)
            self._splits.fetch(validation)
            with suppress(DataError):  # the command test will report the error
                self._splits.fetch(test)
            return
        found = self._splits.fetch(validation if command == "validate" else test)
        if self._splits.known_names is None or (command == "validate" and not found):
            self._splits.fetch(train)

    def setup(self, stage: str) -> None:
        """Open the splits that a command needs, so that a missing split is reported at once.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            DataError: when a split is missing, a split has classes that are not those of training,
                there is only one class to train on, or timm does not know the augmentation policy.
        """
        if stage == "fit":
            self._check_augmentation()
            _ = self._splits.fit_subsets
            if len(names := self.class_names) == 1:
                place = self.hparams["root"] or self.hparams["dataset"]
                raise DataError(
                    f"'{place}' has images of a single class, '{names[0]}'; add images of another "
                    "class."
                )
        elif stage == "validate":
            _ = self._splits.validation
        else:
            _ = self._splits.pictures if stage == "predict" else self._splits.test

    def _check_augmentation(self) -> None:
        self.preprocessing.transform(training=True)  # refuses unknown policies
        ignored = ignored_settings(self.preprocessing) if self.spec.is_digits else []
        if ignored:
            rank_zero_info(
                f"{no_effect('data', ignored)} on digits, which are resized, and shifted by up to "
                "one of their original pixels in training."
            )

    def train_dataloader(self) -> Batches:
        """Shuffled batches of images ``[B, C, H, W]`` and class numbers ``[B]``.

        If the attribute `with_indices` is set, batches end with the number of each image, ``[B]``,
        from 0 to `num_train` - 1.

        Raises:
            DataError: when the data cannot be mixed, or its images cannot be numbered.
        """
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit and self.hparams["cache"] != "none":
            raise DataError(
                "--data.cache shuffles the images, but --trainer.overfit_batches needs the same "
                "images in every epoch; leave out --data.cache."
            )
        feed, repeats = self._feed, self.hparams["aug_repeats"]
        return feed.training(
            self._splits.fit_subsets[0], repeats, self.mixing.active, self.with_indices
        )

    def val_dataloader(self) -> Batches | list[Any]:
        """Validation batches in fixed order; an empty list if there is no validation data."""
        subset = self._splits.validation
        return [] if subset is None else self._feed.evaluation(subset)

    def test_dataloader(self) -> Batches:
        """Test batches in fixed order."""
        # Test images are scored only once, so that a cache would be of no use.
        return replace(self._feed, cache="none").evaluation(self._splits.test)

    def predict_dataloader(self) -> Batches:
        """Batches of the images to predict, in the order of the data; -1 stands for no label."""
        return replace(self._feed, cache="none").evaluation(self._splits.pictures, in_order=True)

    def predicted_files(self) -> list[str] | None:
        """Paths of the images to predict, in their order; None if the images are not files."""
        source = self._splits.pictures.source
        files = getattr(source, "file", None)
        if files is None or not len(source) or files(0) is None:
            return None
        return [files(index) for index in range(len(source))]

    def on_after_batch_transfer(
        self, batch: Sequence[Tensor], dataloader_idx: int
    ) -> Sequence[Tensor]:
        """Apply mixup or CutMix to a training batch; labels become soft, ``[B, num_classes]``."""
        if self.mixing.active and self.trainer is not None and self.trainer.training:
            images, labels, *indices = batch
            batch = (*self._mix(images, labels), *indices)
        return batch

    @cached_property
    def _mix(self) -> Mixup:
        return self.mixing.build(self.num_classes)

    def name_images(self, batch: int, places: Sequence[int]) -> list[str]:
        """Names of some images in one of this process's training batches, for messages.

        Args:
            batch: number of the batch in its epoch, counted from 0.
            places: positions of the images in the batch, counted from 0.

        Returns:
            For each image the path of its file, or else its number in the data set or the batch.
        """
        sampler = getattr(self.trainer and self.trainer.train_dataloader, "batch_sampler", None)
        # The sampler inside `Places`, which gives the numbers of the images.
        order = getattr(getattr(sampler, "sampler", None), "sampler", None)
        if order is None:
            return [f"image {place + 1} of the batch" for place in places]
        subset, numbers = self._splits.fit_subsets[0], list(order)
        chosen = [numbers[batch * self.settings.batch_size + place] for place in places]
        if subset.indices is not None:
            chosen = [subset.indices[number] for number in chosen]
        name = getattr(subset.source, "file", lambda number: None)
        return [name(number) or f"image number {number}" for number in chosen]

    @property
    def _feed(self) -> Feed:
        share = Share.of(self.trainer)
        return Feed(self.settings, self.preprocessing, share, self.hparams["cache"], self._seed)

    @cached_property
    def _seed(self) -> int:
        """The process's seed at the time of the first loader; the process may be reseeded later."""
        return torch.initial_seed() % 2**32


def _fields(settings: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the given options that are fields of a settings class."""
    return {field.name: given[field.name] for field in fields(settings)}
