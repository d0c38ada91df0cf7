import inspect
import io
import pickle
import random
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import docstring_parser
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from complaints import complaint
from gpd_cli.data import ImageData, opening
from gpd_cli.data.digits import load_split
from gpd_cli.data.sources import FileSource, hold_out
from gpd_cli.data.transforms import Preprocessing
from gpd_cli.errors import DataError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_split(root, split, per_class=2, classes=COLOURS, extension="png", **options):
    for name in classes:
        folder = root / split / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            # The brightness tells images apart.
            image = Image.new("RGB", (12, 10), tuple(v - 9 * number for v in COLOURS[name]))
            image.save(folder / f"{number}.{extension}", **options)


@pytest.fixture
def tree(tmp_path):
    write_split(tmp_path, "train", 6)
    write_split(tmp_path, "val", 2, extension="webp", lossless=True)
    write_split(tmp_path, "test", 3, extension="jpg")
    return tmp_path


def folder_data(root, **options):
    settings = {"batch_size": 4, "num_workers": 0, "image_size": 8, **options}
    return ImageData("folder", root=str(root), **settings)


def plain(root, **options):
    """Whole images, not augmented, in [0, 1]."""
    statistics = {"mean": [0.0] * 3, "std": [1.0] * 3}
    return folder_data(root, no_aug=True, crop_pct=1.0, **statistics, **options)


def gather(loader):
    batches = list(loader)
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def rows(images):
    return {image.numpy().tobytes() for image in images}


# Digits


def test_digits_are_split_into_disjoint_parts_of_all_images():
    parts = [load_split(split)[0] for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1077, 360, 360]
    assert len(set.union(*(rows(part) for part in parts))) == 1797


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_digits_are_stratified(split):
    shares = torch.bincount(load_split(split)[1], minlength=10) / len(load_split(split)[1])
    everything = torch.cat([load_split(s)[1] for s in ("train", "validation", "test")])
    assert torch.allclose(shares, torch.bincount(everything) / 1797, atol=0.005)


def test_the_digits_split_depends_on_no_seed():
    torch.manual_seed(1)
    np.random.seed(1)
    first = load_split("test")[0]
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, load_split("test")[0])


@pytest.mark.parametrize(("size", "channels"), [(8, None), (32, 1), (20, 3)])
def test_digit_batches(size, channels):
    data = ImageData(image_size=size, in_chans=channels, batch_size=64)
    data.setup("fit")
    shape = (channels or 1, size, size)
    assert data.image_shape == shape
    assert data.num_classes == 10
    assert data.class_names == list("0123456789")
    train = list(data.train_dataloader())
    assert len(train) == 1077 // 64
    for images, labels in train:
        assert images.shape == (64, *shape)
        assert images.dtype == torch.float32
        assert labels.shape == (64,)
        assert labels.dtype == torch.int64
    assert gather(data.val_dataloader())[0].shape == (360, *shape)
    data.setup("test")
    assert gather(data.test_dataloader())[0].shape == (360, *shape)


def test_digits_keep_their_labels_and_grey_values():
    images, labels = load_split("test")
    data = ImageData(image_size=8, mean=[0.0], std=[2.0], batch_size=100)
    loaded = gather(data.predict_dataloader())
    assert torch.allclose(loaded[0], images / 2)
    assert torch.equal(loaded[1], labels)


def test_training_digits_are_shifted_by_at_most_one_original_pixel():
    size, reach = 16, 2
    options = {"image_size": size, "mean": [0.0], "std": [1.0], "batch_size": 200}
    still = ImageData(no_aug=True, **options)
    torch.manual_seed(3)
    originals = gather(still.train_dataloader())[0]
    torch.manual_seed(3)
    shifted = gather(ImageData(**options).train_dataloader())[0]
    padded = torch.nn.functional.pad(originals, [reach] * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).flatten(2, 3)  # [N, 1, 25, H, W]
    matches = (windows == shifted.unsqueeze(2)).all(dim=(1, 3, 4))
    assert matches.any(dim=1).all()
    assert (matches.sum(dim=0) > 0).all()  # every shift occurs


def test_options_that_digits_ignore_are_named(caplog):
    ImageData(image_size=8, no_aug=True, mean=[0.2], in_chans=1, crop_padding=0).setup("fit")
    assert "no effect" not in caplog.text
    ImageData(hflip=0.0, auto_augment="rand-m9", crop_pct=1.0).setup("fit")
    named = "--data.crop_pct, --data.hflip, --data.auto_augment have no effect on digits"
    assert named in caplog.text
    ImageData(re_prob=0.25).setup("fit")
    assert "--data.re_prob has no effect on digits" in caplog.text


def test_digits_are_described_as_whole_images():
    assert ImageData(crop_pct=0.5).image_spec.crop_pct == 1.0


def test_unknown_policies_are_refused_for_digits_too():
    with pytest.raises(DataError, match=r"'nonsense'.*rand-m9"):
        ImageData(auto_augment="nonsense").setup("fit")


# Order and seeds


def test_order_depends_on_seed_and_epoch_alone():
    def labels(seed, epoch, draws=0):
        torch.manual_seed(seed)
        torch.rand(draws)
        loader = ImageData(batch_size=64).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return gather(loader)[1]

    first = labels(seed=5, epoch=0)
    assert torch.equal(first, labels(seed=5, epoch=0, draws=7))
    assert not torch.equal(first, labels(seed=6, epoch=0))
    assert not torch.equal(first, labels(seed=5, epoch=1))
    assert torch.equal(labels(seed=5, epoch=1), labels(seed=5, epoch=1))


def test_the_trainer_changes_the_order_with_each_epoch_and_keeps_it_on_resume(tmp_path):
    class Record(LightningModule):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.seen.append((self.current_epoch, batch[1].tolist()))
            return self.weight * batch[0].mean()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(epochs, **resume):
        torch.manual_seed(0)
        module = Record()
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            limit_train_batches=2,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=ImageData(), **resume)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return module.seen

    whole = fit(3)
    assert whole[0][1] != whole[2][1] != whole[4][1]
    fit(2)
    assert fit(3, ckpt_path=tmp_path / "run.ckpt") == whole[4:]


def test_evaluation_leaves_the_random_state_alone():
    data = ImageData(batch_size=64)
    data.setup("fit")
    loader = data.val_dataloader()
    state = torch.get_rng_state()
    first = gather(loader)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[0], gather(loader)[0])


def test_processes_share_the_training_images_out():
    data = ImageData(batch_size=64)
    seen = []
    for rank in range(2):
        kwargs = {"num_replicas": 2, "rank": rank}
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)
        seen.append(set(data.train_dataloader().sampler))
    assert len(seen[0]) == len(seen[1]) == 539
    assert seen[0] | seen[1] == set(range(1077))


# Folders


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_trees(tree, workers):
    data = plain(tree, num_workers=workers, batch_size=5)
    data.setup("fit")
    assert data.class_names == ["blue", "green", "red"]
    assert data.num_classes == 3
    assert data.image_shape == (3, 8, 8)
    images, labels = gather(data.train_dataloader())
    assert images.shape == (15, 3, 8, 8)  # the last batch of 3 is dropped
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    images, labels = gather(data.val_dataloader())
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    # Red images are bright in channel 0, class 2, and so on.
    assert torch.equal(images.mean(dim=(2, 3)).argmax(dim=1), 2 - labels)
    data.setup("test")
    assert gather(data.test_dataloader())[1].tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_a_validation_folder_is_found_by_each_of_its_names(tmp_path, name):
    write_split(tmp_path, "train", 6)
    write_split(tmp_path, name, 5)
    assert len(gather(plain(tmp_path).val_dataloader())[1]) == 15


def test_one_batch_is_not_dropped(tree):
    images, _ = gather(folder_data(tree, batch_size=64).train_dataloader())
    assert len(images) == 18


def test_grey_images_of_colours_and_colours_of_grey_images(tree):
    data = folder_data(tree, in_chans=1, mean=[0.0], std=[1.0])
    images, labels = gather(data.val_dataloader())
    assert images.shape == (6, 1, 8, 8)
    assert images[labels == 1].mean() > images[labels == 0].mean()  # green is brighter than blue
    Image.new("L", (9, 9), 100).save(tree / "val" / "red" / "0.webp")
    images, labels = gather(plain(tree).val_dataloader())
    assert torch.allclose(images[4], torch.full((3, 8, 8), 100 / 255), atol=0.02)


def test_default_statistics_are_those_of_imagenet(tree):
    raw = gather(plain(tree).val_dataloader())[0]
    normalized = gather(folder_data(tree).val_dataloader())[0]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(normalized, (raw - mean) / std, atol=1e-5)


def test_a_part_of_training_is_held_out_where_there_is_no_validation_split(tmp_path):
    write_split(tmp_path, "train", 8)
    write_split(tmp_path, "test", 2)
    data = plain(tmp_path, val_fraction=0.25, batch_size=2)
    data.setup("fit")
    trained, train_labels = gather(data.train_dataloader())
    held_out, labels = gather(data.val_dataloader())
    assert Counter(labels.tolist()) == {0: 2, 1: 2, 2: 2}
    assert Counter(train_labels.tolist()) == {0: 6, 1: 6, 2: 6}
    assert len(rows(trained) | rows(held_out)) == 24
    assert not rows(trained) & rows(held_out)


def test_what_is_held_out_depends_on_the_data_seed_alone(tmp_path):
    write_split(tmp_path, "train", 8)

    def held_out(seed, global_seed):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        data = plain(tmp_path, val_fraction=0.25, seed=seed)
        return rows(gather(data.val_dataloader())[0])

    assert held_out(0, 1) == held_out(0, 2)
    assert held_out(0, 1) != held_out(1, 1)


def test_held_out_images_are_not_augmented(tmp_path):
    write_split(tmp_path, "train", 8)
    data = folder_data(tmp_path, val_fraction=0.25, re_prob=1.0, color_jitter=0.4)
    loader = data.val_dataloader()
    assert torch.equal(gather(loader)[0], gather(loader)[0])


def test_null_holds_out_although_there_is_a_validation_split(tree):
    data = plain(tree, val_split=None, val_fraction=0.5)
    assert len(gather(data.val_dataloader())[1]) == 9


def test_nothing_held_out_is_no_validation(tmp_path):
    write_split(tmp_path, "train", 4)
    data = folder_data(tmp_path, val_fraction=0.0)
    assert data.val_dataloader() == []
    assert len(gather(data.train_dataloader())[1]) == 12


def test_hold_out_is_a_partition():
    labels = np.repeat(np.arange(5), 20)
    source = FileSource(SimpleNamespace(targets=labels, classes=list("abcde")))
    kept, held_out = hold_out(source, 0.3, seed=1, purpose="validation", remedy="")
    assert sorted(kept + held_out) == list(range(100))
    assert Counter(labels[held_out]) == dict.fromkeys(range(5), 6)


# Augmentation


def test_no_class_is_left_out_of_what_is_held_out(tmp_path):
    """Proportions alone leave no image of a rare class."""
    for name, count in (("blue", 40), ("green", 40), ("red", 2)):
        write_split(tmp_path, "train", count, [name])
    data = folder_data(tmp_path, val_fraction=0.1)
    data.setup("fit")
    kept, held_out = (
        Counter(gather(loader)[1].tolist())
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert held_out[2] == kept[2] == 1
    assert sum((kept + held_out).values()) == 82


def test_many_rare_classes_are_held_out():
    """A class of two images has one in each part, and an image is in one part only."""
    labels = np.repeat(np.arange(20_000), 2)
    source = SimpleNamespace(labels=lambda: labels)
    kept, held_out = hold_out(source, 0.5, 0, purpose="validation", remedy="none")
    assert sorted(kept + held_out) == list(range(40_000))
    assert set(labels[kept]) == set(labels[held_out]) == set(range(20_000))


def test_training_images_are_augmented_and_evaluated_ones_not(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            noise = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / split / name / "0.png")
    data = folder_data(tmp_path)
    train, val = data.train_dataloader(), data.val_dataloader()
    first = gather(train)[0]
    assert torch.equal(gather(train)[0], first)  # of the same epoch
    train.sampler.set_epoch(1)
    assert not torch.equal(gather(train)[0], first)
    assert torch.equal(gather(val)[0], gather(val)[0])
    calm = folder_data(tmp_path, no_aug=True).train_dataloader()
    images, labels = gather(calm)
    assert torch.equal(images[0], images[1])
    assert set(labels.tolist()) == {0, 1}


def test_padded_crops_shift_at_full_scale(tmp_path):
    noise = np.random.default_rng(0).integers(1, 255, (8, 8, 3), dtype=np.uint8)
    for number in range(40):
        path = tmp_path / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    options = {"mean": [0.0] * 3, "std": [1.0] * 3, "batch_size": 40, "val_fraction": 0.0}
    data = folder_data(tmp_path, crop_padding=1, hflip=0.0, **options)
    images, _ = gather(data.train_dataloader())
    padded = torch.nn.functional.pad(torch.from_numpy(noise).permute(2, 0, 1) / 255, [1] * 4)
    windows = padded.unfold(1, 8, 1).unfold(2, 8, 1).flatten(1, 2).transpose(0, 1)  # [9, 3, 8, 8]
    matches = torch.stack([torch.isclose(windows, image).all(dim=(1, 2, 3)) for image in images])
    assert (matches.sum(dim=1) == 1).all()
    assert (matches.sum(dim=0) > 0).all()


def test_images_are_resized_before_they_are_padded_as_the_data_says():
    board = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    grey = {"in_chans": 1, "mean": (0.0,), "std": (1.0,), "hflip": 0.0}
    steps = Preprocessing(image_size=8, crop_padding=1, interpolation="nearest", **grey)
    assert set(steps.transform(training=True)(board).unique().tolist()) == {0.0, 1.0}


def test_settings_of_the_augmentation_arrive():
    crops = {"scale": (0.5, 0.6), "ratio": (1.0, 1.25)}
    steps = Preprocessing(**crops, color_jitter=0.25, re_prob=0.5, re_count=3)
    (augment,) = steps.transform(training=True).transforms
    crop = augment.transforms[0]
    assert (tuple(crop.scale), tuple(crop.ratio)) == ((0.5, 0.6), (1.0, 1.25))
    (jitter,) = [step for step in augment.transforms if isinstance(step, transforms.ColorJitter)]
    assert jitter.brightness == (0.75, 1.25)
    (erasing,) = [step for step in augment.transforms if isinstance(step, RandomErasing)]
    assert (erasing.probability, erasing.max_count) == (0.5, 3)


def test_evaluated_images_are_cropped_as_asked():
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    steps = Preprocessing(image_size=4, crop_pct=0.5, mean=(0.0,) * 3, std=(1.0,) * 3)
    found = steps.transform(training=False)(Image.fromarray(noise))
    torch.testing.assert_close(found, torch.from_numpy(noise).permute(2, 0, 1)[:, 2:6, 2:6] / 255)


@pytest.mark.parametrize(
    ("policy", "channels"),
    [
        ("rand-m9-mstd0.5-inc1", 3),
        ("rand-m9", 1),
        ("augmix-m5-w4-d2", 3),
        ("original", 3),
        ("3a", 1),
    ],
)
def test_policies_of_timm(tree, policy, channels):
    data = folder_data(tree, auto_augment=policy, in_chans=channels, re_prob=0.25)
    images, _ = gather(data.train_dataloader())
    assert images.shape[1:] == (channels, 8, 8)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    "policy",
    ["rand-m10-n8-inc1", "rand-m0-n8", "rand-m20-n8-mmax20-inc1", "augmix-m10-w4-d3", "v0"],
)
def test_policies_may_posterize_to_no_bits(policy):
    # Pillow 13 refuses to.
    augment = Preprocessing(image_size=8, auto_augment=policy, hflip=0.0).transform(training=True)
    augment = pickle.loads(pickle.dumps(augment))  # as for processes that are no forks
    random.seed(0)
    np.random.seed(0)
    image = Image.fromarray(np.random.randint(0, 256, (8, 8, 3), dtype=np.uint8))
    assert torch.stack([augment(image) for _ in range(200)]).isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m9-n8", "augmix-m5-w4-d3", "original", "v0"])
def test_policies_go_with_lanczos(policy):
    # Pillow resizes with Lanczos and refuses to rotate and shear with it.
    sharp = Preprocessing(image_size=8, auto_augment=policy, interpolation="lanczos", hflip=0.0)
    augment = pickle.loads(pickle.dumps(sharp.transform(training=True)))
    random.seed(0)
    np.random.seed(0)
    image = Image.fromarray(np.random.randint(0, 256, (8, 8, 3), dtype=np.uint8))
    assert torch.stack([augment(image) for _ in range(50)]).isfinite().all()


def test_policies_interpolate_as_the_data_says():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def augmented(interpolation):
        # The image has its size already, so that the policy alone interpolates.
        whole = {"image_size": 16, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
        steps = Preprocessing(**whole, auto_augment="rand-m9-n4", interpolation=interpolation)
        augment = steps.transform(training=True)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return torch.stack([augment(Image.fromarray(noise)) for _ in range(10)])

    bicubic = augmented("bicubic")
    assert not torch.equal(augmented("nearest"), bicubic)
    assert not torch.equal(augmented("bilinear"), bicubic)
    assert torch.equal(augmented("lanczos"), bicubic)


class Watch(LightningModule):
    """Records the labels that each kind of step gets."""

    def __init__(self):
        super().__init__()
        self.labels = {"train": [], "val": [], "test": []}
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.labels["train"].append(batch[1])
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.labels["val"].append(batch[1])

    def test_step(self, batch, batch_idx):
        self.labels["test"].append(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("mixing", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_labels_are_mixed_in_training_only(mixing):
    data, module = ImageData(batch_size=64, **mixing), Watch()
    trainer = Trainer(fast_dev_run=3, accelerator="cpu", enable_progress_bar=False, logger=False)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    mixed = torch.cat(module.labels["train"])
    assert mixed.shape == (192, 10)
    assert torch.allclose(mixed.sum(dim=1), torch.ones(192))
    assert ((mixed > 0).sum(dim=1) == 2).any()
    for stage in ("val", "test"):
        labels = torch.cat(module.labels[stage])
        assert labels.ndim == 1
        assert labels.dtype == torch.int64


# torchvision and streams


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def grey_digits(count):
    """Labels from 0 to 9 in turn, and images whose grey is 20 times the label."""
    labels = np.arange(count) % 10
    return labels, np.repeat(labels, 28 * 28).reshape(count, 28, 28) * 20


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels, images = grey_digits(count)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images + (prefix == "t10k"))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return tmp_path


SMALL = {"batch_size": 5, "num_workers": 0, "image_size": 8, "val_fraction": 0.25}


def torchvision_data(root, **options):
    settings = SMALL | options
    return ImageData("torch/mnist", root=str(root), mean=[0.0] * 3, std=[1.0] * 3, **settings)


def test_torchvision_never_validates_on_test_images(mnist):
    data = torchvision_data(mnist, no_aug=True)
    data.setup("fit")
    data.setup("test")
    parts = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    grey = [(gather(part)[0][:, 0, 0, 0] * 255).round().long() for part in parts]
    assert [len(values) for values in grey] == [30, 10, 20]
    assert torch.cat(grey[:2]).remainder(20).eq(0).all()
    assert grey[2].remainder(20).eq(1).all()


def test_torchvision_has_no_other_splits(mnist):
    with pytest.raises(DataError, match=r"no split 'val'.*there is: train, test"):
        torchvision_data(mnist, val_split="val").setup("fit")


@pytest.fixture
def qmnist(tmp_path):
    folder = tmp_path / "QMNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("test", 20)):
        labels, images = grey_digits(count)
        write_idx(folder / f"qmnist-{split}-images-idx3-ubyte", images + (split == "test"))
        # Beside the class number: writer, place in the form, and so on, another for each image.
        rows = np.stack([labels, *(np.arange(count) + column for column in range(7))], axis=1)
        header = struct.pack(">HBB2I", 0, 12, 2, *rows.shape)
        (folder / f"qmnist-{split}-labels-idx2-int").write_bytes(
            header + rows.astype(">i4").tobytes()
        )
    return tmp_path


def test_qmnist_is_validated_on_a_part_of_its_training_images(qmnist):
    data = ImageData(
        "torch/qmnist", root=str(qmnist), mean=[0.0] * 3, std=[1.0] * 3, **SMALL, no_aug=True
    )
    data.setup("fit")
    data.setup("test")
    parts = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    images, labels = zip(*(gather(part) for part in parts), strict=True)
    grey = [(values[:, 0, 0, 0] * 255).round().long() for values in images]
    assert [len(values) for values in grey] == [30, 10, 20]
    assert [values.remainder(20).unique().tolist() for values in grey] == [[0], [0], [1]]
    assert torch.equal(torch.cat(grey) // 20, torch.cat(labels))


@pytest.mark.parametrize("name", ["torch/MNIST", "TORCH/mnist", "torch/a/mnist"])
def test_a_test_split_is_not_validated_on_however_the_data_set_is_written(mnist, name):
    # timm reads all of them as torch/mnist.
    with pytest.raises(DataError, match=r"no split 'val'.*there is: train, test"):
        ImageData(name, root=str(mnist), val_split="val", **SMALL).setup("fit")


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder", "torch/Folder"])
def test_image_folders_of_torchvision_are_split_as_image_folders(tmp_path, name):
    write_split(tmp_path, "", 20)
    data = ImageData(name, root=str(tmp_path), **SMALL)
    data.setup("fit")
    data.setup("test")
    assert data.hparams["dataset"] == data.image_spec.dataset == "folder"
    files = []
    for part in (*data._splits.fit_subsets, data._splits.test):
        numbers = range(len(part.source)) if part.indices is None else part.indices
        files += [part.source.file(number) for number in numbers]
    assert len(files) == len(set(files)) == 60


def test_torchvision_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"torch/cifar10.*--data\.download true"):
        ImageData("torch/cifar10", root=str(tmp_path)).setup("fit")
    with pytest.raises(DataError, match=r"Unknown data set 'torch/cifar11' .*mean torch/cifar10\?"):
        ImageData("torch/cifar11", root=str(tmp_path)).setup("fit")


def test_columns_of_tables_are_checked(monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda module: module)
    table = [{"img": {"bytes": b"..."}, "fine": 3, "coarse": 1, "image": None}]
    reader = SimpleNamespace(dataset=table, image_key="img", label_key="label", class_to_idx={})
    dataset = SimpleNamespace(reader=reader)
    monkeypatch.setattr(opening, "create_dataset", lambda *args, **kwargs: dataset)
    with pytest.raises(DataError, match=r"no column 'label'.*target_key.*img, fine, coarse, image"):
        ImageData("hfds/name").setup("fit")
    reader.image_key = "image"
    with pytest.raises(DataError, match=r"no column 'image'.*--data\.input_key"):
        ImageData("hfds/name").setup("fit")
    table[0] |= {"image": {"bytes": b"..."}, "label": None}  # a split without labels
    ImageData("hfds/name", test_split="test", classes=3).setup("test")


class FakeReader:
    """Reads a stream of grey images, as timm's readers of streams do."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return 6

    def __iter__(self):
        for number in range(6):
            yield Image.new("RGB", (9, 9), (number, 0, 0)), number % 3


def streamed_data(monkeypatch, reader, **options):
    monkeypatch.setattr(opening, "find_spec", lambda module: module)
    dataset = IterableImageDataset(None, reader=reader)
    monkeypatch.setattr(opening, "create_dataset", lambda *args, **kwargs: dataset)
    return ImageData("tfds/name", root=".", batch_size=2, num_workers=0, **options)


def test_streams_are_told_the_epoch(monkeypatch):
    reader = FakeReader()
    data = streamed_data(monkeypatch, reader, classes=3, test_split="validation")
    data.setup("fit")
    assert data.num_classes == 3
    assert data.class_names == ["0", "1", "2"]
    loader = data.train_dataloader()
    for _ in range(3):
        images, labels = gather(loader)
        assert images.shape == (6, 3, 32, 32)
        assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert reader.epochs == [0, 1, 2]


def test_streams_name_no_classes_and_have_no_part_to_hold_out(monkeypatch):
    with pytest.raises(DataError, match=r"tfds/name.*--data\.classes"):
        streamed_data(monkeypatch, FakeReader()).setup("fit")
    with pytest.raises(DataError, match=r"streamed.*--data\.val_split"):
        streamed_data(monkeypatch, FakeReader(), classes=3, val_split=None).setup("fit")


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "folder"}, r"--data\.root"),
        ({"dataset": "folder", "root": "nowhere"}, "There is no folder 'nowhere'"),
        ({"dataset": "imagenet"}, r"'imagenet'.*digits, folder.*torch/NAME"),
        ({"dataset": "web/thing"}, "'web/thing'.*wds/NAME"),
        ({"dataset": "torch/cifar10"}, r"'torch/cifar10' needs --data\.root"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 33, "mixup": 0.5}, "even number, not 33"),
        ({"mean": [0.1, 0.2]}, "mean has 2 values but the images have 1 channel"),
        ({"in_chans": 3, "std": [0.1]}, "std has 1 value.*3"),
        ({"image_size": 0}, "image_size"),
        ({"crop_pct": 1.2}, "crop_pct"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(DataError, match=message):
        ImageData(**settings)


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("hfds", "datasets"), ("tfds", "tensorflow-datasets"), ("wds", "webdataset")],
)
def test_a_missing_package_is_named(monkeypatch, scheme, package):
    monkeypatch.setattr(opening, "find_spec", lambda module: None)
    with pytest.raises(DataError, match=rf"{scheme}/.*pip install.*{package}"):
        ImageData(f"{scheme}/name", root=".")


@pytest.mark.parametrize("policy", ["nonsense", "rand-mx", "rand-m9-mstdinf", "augmix-w"])
def test_unknown_policies(tree, policy):
    """timm leaves out a part without a number, so that another policy would be in effect."""
    data = folder_data(tree, auto_augment=policy)
    with pytest.raises(DataError, match=rf"'{policy}'.*rand-m9"):
        data.train_dataloader()


def test_missing_splits_are_named(tree):
    with pytest.raises(DataError, match=r"no split 'dev'.*there is: test, train, val"):
        folder_data(tree, val_split="dev").setup("fit")
    with pytest.raises(DataError, match=r"no split 'fit'"):
        folder_data(tree, train_split="fit").setup("fit")
    with pytest.raises(DataError, match=r"no split 'eval'"):
        folder_data(tree, test_split="eval").setup("test")
    with pytest.raises(DataError, match=r"digits.*no split 'dev'.*train, validation, test"):
        ImageData(val_split="dev").setup("fit")


@pytest.mark.parametrize("option", ["train", "val"])
def test_a_missing_split_is_named_with_its_option(tmp_path, option):
    write_split(tmp_path, "test")
    named = rf"another split with --data\.{option}_split \(there is: test\)"
    with pytest.raises(DataError, match=named):
        folder_data(tmp_path).spec.open(option, mode="RGB", training=False)


def test_a_test_split_is_only_needed_by_the_commands_that_score_it(tmp_path):
    write_split(tmp_path, "train", 4)
    data = folder_data(tmp_path, val_fraction=0.25)
    data.setup("fit")
    with pytest.raises(DataError, match=r"no split 'test'.*--data\.test_split"):
        data.setup("test")


def test_empty_folders_and_images_without_class(tree):
    for path in (tree / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"No images in '.*train'.*train/CLASS/IMAGE"):
        folder_data(tree).setup("fit")
    Image.new("RGB", (4, 4)).save(tree / "train" / "stray.png")
    with pytest.raises(DataError, match=r"images directly in '.*train'"):
        folder_data(tree).setup("fit")


@pytest.mark.parametrize(("split", "stage"), [("val", "fit"), ("test", "test")])
def test_splits_with_other_classes(tree, split, stage):
    (tree / split / "red").rename(tree / split / "crimson")
    with pytest.raises(
        DataError, match=r"training images do not have: 'crimson' \(those of training are"
    ):
        folder_data(tree).setup(stage)


def test_a_number_of_classes_that_the_data_contradicts(tree):
    with pytest.raises(DataError, match=r"has 3 classes, not 7"):
        folder_data(tree, classes=7).setup("fit")


def test_too_few_images_to_hold_out(tmp_path):
    write_split(tmp_path, "train", 1)
    with pytest.raises(DataError, match=r"3 images in 3 classes.*'blue', has 1\).*val_fraction"):
        folder_data(tmp_path, val_fraction=0.3).setup("fit")


def test_too_few_images_to_mix(tree):
    with pytest.raises(DataError, match=r"18 training images.*batch_size"):
        folder_data(tree, batch_size=20, mixup=0.5).train_dataloader()


def damage(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("no image")
        return
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "png")
    path.write_bytes(stream.getvalue()[:1500])


@pytest.mark.parametrize("kind", ["text", "truncated"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_sentence(tree, kind, workers):
    bad = tree / "train" / "green" / "3.png"
    damage(bad, kind)
    message = complaint(folder_data(tree, num_workers=workers).train_dataloader())
    assert message.startswith(f"The image {bad} cannot be read (")
    assert "\n" not in message


# Settings


def test_settings_survive_in_a_checkpoint_without_code():
    parser = ArgumentParser()
    parser.add_class_arguments(ImageData, "data")
    options = parser.parse_args(
        ["--data.scale=[0.5, 1.0]", "--data.mean=[0.3]", "--data.batch_size=16", "--data.mixup=0.2"]
    )
    data = ImageData(**options.data.as_dict())
    stream = io.BytesIO()
    torch.save(dict(data.hparams), stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    assert set(saved) == set(inspect.signature(ImageData).parameters)
    assert tuple(saved["scale"]) == (0.5, 1.0)
    assert saved["batch_size"] == 16
    assert ImageData(**saved).hparams == data.hparams


def test_every_option_has_its_help():
    documented = docstring_parser.parse(ImageData.__doc__).params
    assert [p.arg_name for p in documented] == list(inspect.signature(ImageData).parameters)
