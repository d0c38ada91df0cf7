"""The LightningDataModule of all image data."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from gpd_cli.data.opening import DataSpec, MissingSplitError
from gpd_cli.data.sources import Indices, Source, hold_out
from gpd_cli.data.transforms import Interpolation, Preprocessing
from gpd_cli.errors import DataError

_WHERE_PRESENT = "validation"
_Part = tuple[Source, Indices | None]  # some of a split's images, or all


class ImageData(LightningDataModule):
    """Images with class numbers, by timm's readers and transforms.

    Checkpoints are to be chosen on validation images and scored once on test images. A data set
    without validation split gets one: a part of its training images, the same in every run, which
    is then not trained on. Training images are shuffled by global seed and epoch alone, so a
    resumed run sees them in the order of an uninterrupted one.

    Args:
        dataset: digits (scikit-learn's 1,797 handwritten digits, nothing to download), folder (a
            tree root/SPLIT/CLASS/IMAGE), or any of timm's: torch/cifar10, torch/cifar100, hfds/NAME
            (Hugging Face), hfids/NAME (streamed), tfds/NAME, wds/NAME (WebDataset).
        root: the folder of the data set.
        train_split: split to train on.
        val_split: split to validate on; where the data set has no split "validation", or with null,
            val_fraction of the training images is held out instead.
        test_split: split of the commands test and predict.
        val_fraction: share of the training images held out, of every class; 0 trains on all of
            them, without validation.
        classes: number of classes, for a data set that does not name them.
        input_key: column of the images, where it is not the scheme's usual one.
        target_key: column of the labels, where it is not the scheme's usual one.
        download: download the data set to root if it is not there.
        image_size: height and width that the network sees, in pixels.
        in_chans: channels that the network sees, 1 (grey) or 3 (RGB); images are converted; by
            default 1 for digits and 3 for all others.
        mean: mean of each channel for normalization, of values in [0, 1]; by default ImageNet's for
            RGB and 0.5 for grey.
        std: standard deviation of each channel; by default ImageNet's for RGB and 0.5 for grey.
        interpolation: how to resize.
        crop_pct: in evaluation, share of the resized image's edge that the center crop keeps (0.875
            resizes to 256 and crops 224); 1.0 for small images that fill the frame, such as CIFAR.
        no_aug: train without augmentation: resize and center crop only.
        scale: least and greatest area of the random crop, as shares of the image.
        ratio: least and greatest aspect ratio of the random crop.
        crop_padding: pad by this many pixels and crop at random, instead of the random resized crop
            (4 for CIFAR).
        hflip: probability of a horizontal flip.
        color_jitter: strength of random brightness, contrast and saturation (0.4 is common); timm
            leaves it out where auto_augment is set.
        auto_augment: policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original.
        re_prob: probability of random erasing, filled with noise.
        mixup: strength (alpha) of mixup; with mixup or cutmix, training labels are soft.
        cutmix: strength (alpha) of CutMix; with both, each batch gets one of the two.
        batch_size: images per batch and process.
        num_workers: processes that load images, per process (digits need none).
        seed: the choice of held-out images depends on this seed and on nothing else.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        train_split: str = "train",
        val_split: str | None = _WHERE_PRESENT,
        test_split: str = "test",
        val_fraction: float = 0.1,
        classes: int | None = None,
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
        mixup: float = 0.0,
        cutmix: float = 0.0,
        batch_size: int = 128,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # config.yaml has them; `ratio` is the model's
        _check_ranges(val_fraction, batch_size, num_workers, mixing=mixup > 0 or cutmix > 0)
        self.spec = DataSpec(
            dataset=dataset,
            root=root,
            input_key=input_key,
            target_key=target_key,
            classes=classes,
            download=download,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        self.preprocessing = Preprocessing(
            image_size=image_size,
            in_chans=in_chans or self.spec.in_chans,
            mean=tuple(mean) if mean else None,
            std=tuple(std) if std else None,
            interpolation=interpolation,
            crop_pct=crop_pct,
            no_aug=no_aug,
            scale=scale,
            ratio=ratio,
            crop_padding=crop_padding,
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            re_prob=re_prob,
        )

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers."""
        return self._train.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes; opens the training split when that has not been done yet."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image as the network sees it."""
        size = self.preprocessing.image_size
        return self.preprocessing.in_chans, size, size

    def prepare_data(self) -> None:
        """Download, once per machine."""
        if self.spec.download:
            for split in (self.hparams["train_split"], self.hparams["test_split"]):
                try:
                    self._open(split)
                except MissingSplitError:  # said by the command that needs the split
                    continue

    def setup(self, stage: str) -> None:
        """Open the splits that a command needs, so that what is missing is said at once.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            DataError: when a split is missing, or its classes are not those of training.
        """
        _ = self._fit_parts if stage in ("fit", "validate") else self._test

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of images ``[B, C, H, W]`` and class numbers ``[B]``, shuffled."""
        part, _ = self._fit_parts
        images = self._images(part, training=True)
        if self._train.streamed:
            return self._loader(images, drop_last=True)
        shards = getattr(self.trainer, "distributed_sampler_kwargs", None)
        # In one process too: its order is a function of seed and epoch, drawn from no global state.
        sampler: DistributedSampler[Any] = DistributedSampler(
            images,
            **(shards or {"num_replicas": 1, "rank": 0}),
            seed=torch.initial_seed() % 2**32,
        )
        batch = self.hparams["batch_size"]
        if len(sampler) < batch and self._mixing:
            raise DataError(
                f"There are {len(sampler)} training images per process, fewer than a batch, and "
                "mixing needs full batches; lower --data.batch_size."
            )
        return self._loader(images, sampler=sampler, drop_last=len(sampler) >= batch)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation batches in fixed order; none at all when nothing is held out."""
        _, part = self._fit_parts
        return [] if part is None else self._fixed_loader(part)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in fixed order."""
        return self._fixed_loader(self._test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Test batches, to write predictions for."""
        return self.test_dataloader()

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Mix training images and labels; soft labels are ``[B, num_classes]``."""
        if self._mixing and self.trainer is not None and self.trainer.training:
            batch = self._mix(*batch)
        return batch

    @property
    def _mixing(self) -> bool:
        return bool(self.hparams["mixup"] > 0 or self.hparams["cutmix"] > 0)

    @cached_property
    def _mix(self) -> Mixup:
        return Mixup(
            mixup_alpha=self.hparams["mixup"],
            cutmix_alpha=self.hparams["cutmix"],
            # Smoothing is the loss's, and the same there.
            label_smoothing=0.0,
            num_classes=self.num_classes,
        )

    @cached_property
    def _train(self) -> Source:
        return self._open(self.hparams["train_split"], training=True)

    @cached_property
    def _test(self) -> _Part:
        return self._checked(self.hparams["test_split"]), None

    @cached_property
    def _fit_parts(self) -> tuple[_Part, _Part | None]:
        """What to train on and what to validate on."""
        split, fraction = self.hparams["val_split"], self.hparams["val_fraction"]
        if split is not None:
            try:
                return (self._train, None), (self._checked(split), None)
            except MissingSplitError:
                if split != _WHERE_PRESENT:
                    raise
        if fraction == 0:
            return (self._train, None), None
        kept, held_out = hold_out(self._train.labels(), fraction, self.hparams["seed"])
        rank_zero_info(
            f"{len(held_out)} of the {len(kept) + len(held_out)} training images are held out for "
            "validation."
        )
        return (self._train, kept), (self._train, held_out)

    def _open(self, split: str, training: bool = False) -> Source:
        return self.spec.open(split, mode=self.preprocessing.mode, training=training)

    def _checked(self, split: str) -> Source:
        """A split whose classes are those of training."""
        source = self._open(split)
        names, trained = source.class_names, self._train.class_names
        if names == trained:
            return source
        example = (sorted(set(names) ^ set(trained)) or names)[0]
        raise DataError(
            f"Split '{split}' has {len(names)} classes and '{self.hparams['train_split']}' has "
            f"{len(trained)}, and '{example}' is in one of them only; give both the same classes."
        )

    def _images(self, part: _Part, training: bool = False) -> Dataset[Any]:
        source, indices = part
        return source.images(self.preprocessing, training, indices)

    def _fixed_loader(self, part: _Part) -> DataLoader[Any]:
        # With a generator of its own, evaluation leaves the global random state as it is.
        return self._loader(self._images(part), generator=torch.Generator())

    def _loader(self, images: Dataset[Any], **options: Any) -> DataLoader[Any]:
        # Digits are in memory; processes would only cost time.
        workers = 0 if self.spec.is_digits else self.hparams["num_workers"]
        strategy = getattr(self.trainer, "strategy", None)
        return DataLoader(
            images,
            batch_size=self.hparams["batch_size"],
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=strategy is not None and strategy.root_device.type == "cuda",
            **options,
        )


def _check_ranges(val_fraction: float, batch_size: int, num_workers: int, mixing: bool) -> None:
    if not 0 <= val_fraction < 1:
        raise DataError(f"--data.val_fraction must be in [0, 1), not {val_fraction}.")
    if batch_size < 1 or num_workers < 0:
        raise DataError("--data.batch_size must be positive and --data.num_workers not negative.")
    if mixing and batch_size % 2:
        raise DataError(
            f"Mixup and CutMix mix images in pairs; make --data.batch_size even, not {batch_size}."
        )
