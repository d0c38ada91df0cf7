"""Large data sets, several processes, streams, caches and repeated augmentation."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from packaging.version import Version
from PIL import Image
from timm.data import IterableImageDataset
from timm.loss import SoftTargetCrossEntropy

from gpd_cli.data import ImageData, cached, loaders
from gpd_cli.data.batch_transforms import Draws, crop_and_flip, draw, normalize
from gpd_cli.data.digits import load_split
from gpd_cli.data.samplers import RepeatedSampler
from gpd_cli.data.streams import StreamSource
from gpd_cli.data.transforms import Preprocessing
from gpd_cli.errors import DataError
from gpd_cli.generators import seeded_generator

STREAMS_TABLES = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="the data extra asks for a newer timm"
)

CLASSES = ("a", "b", "c")
SIZE = 8


def picture(number, split="train"):
    """An image whose colour tells its number; those of other splits are blue."""
    return Image.new("RGB", (SIZE, SIZE), (number, 0, 0 if split == "train" else 200))


def write_folder(root, split="train", count=12):
    for number in range(count):
        path = root / split / CLASSES[number % 3] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, split).save(path)
    return root


def write_noise(root, count=12, split="train", size=SIZE):
    for number in range(count):
        path = root / split / CLASSES[number % 3] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(1, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return root


def data_of(root, dataset="folder", **options):
    """Whole images in [0, 1], not augmented unless options say so."""
    settings = {
        "image_size": SIZE,
        "crop_pct": 1.0,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "no_aug": True,
        "num_workers": 0,
        "batch_size": 4,
        "val_fraction": 0.0,
    }
    return ImageData(dataset, root=str(root), **(settings | options))


def process(rank=0, world=1, epoch=0, **options):
    """As much of a trainer as the data asks for."""
    shards = {"num_replicas": world, "rank": rank}
    return SimpleNamespace(distributed_sampler_kwargs=shards, current_epoch=epoch, **options)


def numbers(loader):
    """The images of a pass, by the number in their colour."""
    return [round(value) for b in loader for value in (b[0][:, 0, 0, 0] * 255).tolist()]


def gather(loader):
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


# Transforms of batches


def test_crops_and_flips_are_those_drawn():
    images = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8)
    draws = draw(5, 2, 0.5, seeded_generator(3))
    draws = draws._replace(flipped=torch.tensor([True, False, True, False, True]))
    result = crop_and_flip(images, 2, draws)
    assert result.dtype == torch.uint8
    for number, image in enumerate(images):
        top, left = int(draws.down[number]), int(draws.across[number])
        window = F.pad(image, [2] * 4)[:, top : top + 6, left : left + 4]
        assert torch.equal(result[number], window.flip(2) if draws.flipped[number] else window)


def test_without_padding_and_flips_images_stay():
    images = torch.rand(4, 1, 5, 5)
    assert torch.equal(crop_and_flip(images, 0, draw(4, 0, 0.0, seeded_generator(0))), images)
    assert torch.equal(
        crop_and_flip(images, 0, draw(4, 0, 1.0, seeded_generator(0))), images.flip(3)
    )


def test_draws_are_uniform_and_depend_on_every_part_of_their_key():
    draws = draw(9000, 1, 0.25, seeded_generator(7, 1, 0))
    for corner in (draws.down, draws.across):
        assert np.allclose(torch.bincount(corner).numpy() / 9000, 1 / 3, atol=0.03)
    assert draws.flipped.float().mean().item() == pytest.approx(0.25, abs=0.03)

    def corners(*key):
        return draw(50, 4, 0.5, seeded_generator(*key)).down.tolist()

    keys = [(7, 1, 0), (7, 1, 1), (7, 2, 0), (8, 1, 0), (1, 7, 0)]
    assert len({tuple(corners(*key)) for key in keys}) == len(keys)
    assert corners(7, 1, 0) == corners(7, 1, 0)


def test_parts_of_draws():
    draws = Draws(torch.arange(6), torch.arange(6) + 10, torch.arange(6) % 2 == 0)
    assert [values.tolist() for values in draws.select(slice(2, 4))] == [
        [2, 3],
        [12, 13],
        [True, False],
    ]


def test_bytes_are_normalized_as_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 1, 1)
    result = normalize(images, mean=(0.5, 0.0), std=(0.25, 2.0))
    expected = torch.tensor([[-2.0, 0.0], [-1.2, 0.1], [2.0, 0.5]])
    assert torch.allclose(result.flatten(1), expected)
    assert images[1, 0].item() == 51


# Cache


@pytest.mark.parametrize("cache", ["memory", "device"])
@pytest.mark.parametrize("size", [SIZE, 12])
def test_a_cache_changes_neither_images_nor_order_nor_what_is_held_out(tmp_path, cache, size):
    write_noise(tmp_path, 24, size=10)
    options = {"val_fraction": 0.25, "image_size": size, "mean": [0.4] * 3, "std": [0.3] * 3}
    passes = []
    for kind in ("none", cache):
        torch.manual_seed(5)
        data = data_of(tmp_path, cache=kind, **options)
        loader = data.train_dataloader()
        found = [gather(data.val_dataloader())]
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append(gather(loader))
        assert len(loader) == 4
        passes.append(found)
    for plain, held in zip(*passes, strict=True):
        assert torch.allclose(plain[0], held[0], atol=1e-6)
        assert torch.equal(plain[1], held[1])
    assert not torch.equal(passes[1][1][1], passes[1][2][1])  # another order in each epoch


def windows(image, padding):
    """All crops of a padded image, mirrored ones too, ``[2, places, C, H, W]``."""
    size = image.shape[-1]
    padded = F.pad(image, [padding] * 4)
    found = padded.unfold(1, size, 1).unfold(2, size, 1).flatten(1, 2).transpose(0, 1)
    return torch.stack([found, found.flip(3)])


def test_cached_images_are_cropped_and_flipped_anew_in_each_epoch(tmp_path):
    write_noise(tmp_path, 12)
    augmented = {"no_aug": False, "crop_padding": 1, "cache": "memory"}
    data = data_of(tmp_path, batch_size=6, **augmented)
    data.with_indices = True
    loader = data.train_dataloader()
    originals = data_of(tmp_path, cache="memory").train_dataloader().held.images / 255
    seen = Counter()
    passes = []
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        images, _, indices = gather(loader)
        passes.append(images)
        for image, index in zip(images, indices.tolist(), strict=True):
            matches = torch.isclose(windows(originals[index], 1), image).all(dim=(2, 3, 4))
            assert matches.sum() == 1
            seen[tuple(matches.nonzero()[0].tolist())] += 1
    assert len(seen) == 18  # nine places, mirrored or not
    loader.sampler.set_epoch(3)
    assert torch.equal(gather(loader)[0], passes[3])


def test_processes_draw_crops_of_their_own(tmp_path):
    write_noise(tmp_path, 1)
    seen = []
    for rank in range(2):
        data = data_of(tmp_path, no_aug=False, crop_padding=4, cache="memory", hflip=0.0)
        data.trainer = process(rank, 2)
        seen.append(gather(data.train_dataloader())[0])
    assert not torch.equal(*seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cache_on_the_device_gives_the_same_batches_there(tmp_path):
    write_noise(tmp_path, 12)
    passes = []
    for cache, device in (("memory", "cpu"), ("device", "cuda")):
        torch.manual_seed(0)
        data = data_of(tmp_path, no_aug=False, crop_padding=2, cache=cache)
        data.trainer = process(strategy=SimpleNamespace(root_device=torch.device(device)))
        batches = list(data.train_dataloader())
        assert {tensor.device.type for batch in batches for tensor in batch} == {device}
        passes.append([batch[0].cpu() for batch in batches])
    assert torch.allclose(torch.cat(passes[0]), torch.cat(passes[1]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_augment": "rand-m9"}, r"--data\.auto_augment"),
        ({"color_jitter": 0.4}, r"--data\.color_jitter"),
        ({"re_prob": 0.25}, r"--data\.re_prob"),
        ({"crop_padding": 0}, r"random resized crops.*--data\.crop_padding"),
    ],
)
def test_what_a_cache_cannot_do_is_named(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        data_of(tmp_path, no_aug=False, cache="memory", **({"crop_padding": 4} | options))


def test_digits_and_streams_are_not_cached(monkeypatch):
    with pytest.raises(DataError, match="digits are in memory already"):
        ImageData(cache="memory", crop_padding=4)
    monkeypatch.setattr("gpd_cli.data.opening.find_spec", lambda module: module)
    with pytest.raises(DataError, match=r"'wds/name' is streamed.*--data\.cache"):
        ImageData("wds/name", root=".", cache="device", crop_padding=4)


def test_a_cache_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "_memory", lambda device: 12 * 3 * SIZE * SIZE - 1)
    data = data_of(write_folder(tmp_path), cache="memory")
    with pytest.raises(DataError, match=r"12 training images of 8 x 8 pixels.*--data\.cache"):
        data.train_dataloader()


def test_a_cache_has_the_free_memory_of_the_machine_divided_by_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "_memory", lambda device: 2 * 12 * 3 * SIZE * SIZE - 1)
    data = data_of(write_folder(tmp_path), cache="memory")
    assert len(numbers(data.train_dataloader())) == 12
    data.trainer = process(0, 2, num_devices=2)
    with pytest.raises(DataError, match=r"free for each process; leave out --data\.cache"):
        data.train_dataloader()


def test_the_same_images_in_every_epoch_are_not_cached(tmp_path):
    data = data_of(write_folder(tmp_path), cache="memory")
    data.trainer = process(overfit_batches=2)
    with pytest.raises(DataError, match=r"overfit_batches.*leave out --data\.cache"):
        data.train_dataloader()


def test_a_damaged_image_is_named_while_decoding(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "b" / "004.png").write_text("no image")
    with pytest.raises(DataError, match=r"004\.png cannot be read"):
        data_of(tmp_path, cache="memory").train_dataloader()


# Repeated augmentation


def test_each_image_of_an_epoch_is_repeated(tmp_path):
    data = data_of(write_folder(tmp_path, count=24), aug_repeats=3, batch_size=6)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(6):
        loader.sampler.set_epoch(epoch)
        seen = numbers(loader)
        assert len(seen) == 24
        assert set(Counter(seen).values()) == {3}
        epochs.append(seen)
    assert len({number for seen in epochs for number in seen}) > 16  # others in each epoch
    loader.sampler.set_epoch(2)
    assert numbers(loader) == epochs[2]


def test_repeats_are_augmented_differently(tmp_path):
    write_noise(tmp_path, 12)
    data = data_of(tmp_path, aug_repeats=3, no_aug=False, crop_padding=4, batch_size=3)
    images, _ = next(iter(data.train_dataloader()))
    assert not torch.equal(images[0], images[1])


def test_copies_are_dealt_out_over_processes():
    shares = [list(RepeatedSampler(range(512), 3, 3, rank, seed=1)) for rank in range(3)]
    assert [len(share) for share in shares] == [170] * 3
    assert shares[0] == shares[1] == shares[2]
    assert len(set(shares[0])) == 170
    whole = list(RepeatedSampler(range(512), 3, 1, 0, seed=1))
    dealt = [list(RepeatedSampler(range(512), 3, 2, rank, seed=1)) for rank in range(2)]
    assert [n for pair in zip(*dealt, strict=True) for n in pair] == whole


def test_the_order_of_repeats_is_that_of_the_seed():
    def order(seed, epoch=0):
        sampler = RepeatedSampler(range(300), 3, 1, 0, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(5)
    torch.manual_seed(2)
    assert order(5) == first
    assert order(6) != first
    assert order(5, epoch=1) != first


@pytest.mark.parametrize("repeats", [0, 3])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"cache": "memory"}])
def test_a_resumed_run_sees_the_images_of_an_uninterrupted_one(tmp_path, repeats, options):
    write_folder(tmp_path, count=12)

    def fit(epochs, **resume):
        torch.manual_seed(0)
        module = Record()
        trainer = quiet_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(module, datamodule=data_of(tmp_path, aug_repeats=repeats, **options), **resume)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return module.seen

    whole = fit(3)
    assert len(whole) == 9
    assert whole[:3] != whole[3:6]
    assert fit(2) == whole[:6]
    assert fit(3, ckpt_path=tmp_path / "run.ckpt") == whole[6:]


class Record(LightningModule):
    """Records the numbers of the images that it is trained on."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0][:, 0, 0, 0] * 255).round().int().tolist())
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(folder, **options):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return Trainer(**(settings | options))


# Indices


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"cache": "memory"}])
def test_batches_carry_the_numbers_of_their_images(tmp_path, options):
    data = data_of(write_folder(tmp_path, count=15), val_fraction=0.2, **options)
    data.with_indices = True
    assert data.num_train == 12
    loader = data.train_dataloader()
    which = {}
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for images, labels, indices in loader:
            assert indices.dtype == torch.int64
            colours = (images[:, 0, 0, 0] * 255).round().int().tolist()
            found = list(zip(colours, labels.tolist(), strict=True))
            for index, one in zip(indices.tolist(), found, strict=True):
                assert which.setdefault(index, one) == one
    assert sorted(which) == list(range(12))
    assert len(set(which.values())) == 12
    assert all(len(batch) == 2 for batch in data.val_dataloader())


def test_images_are_named_by_their_places_in_a_batch(tmp_path):
    data = data_of(write_folder(tmp_path, count=24), val_fraction=0.25)
    data.trainer = process(overfit_batches=0)
    data.trainer.train_dataloader = data.train_dataloader()
    seen = numbers(data.trainer.train_dataloader)
    files = [int(Path(name).stem) for name in data.name_images(2, range(4))]
    assert files == seen[8:12]


def test_digits_carry_indices_too():
    data = ImageData(image_size=8, no_aug=True, batch_size=100)
    data.with_indices = True
    images, labels, indices = gather(data.train_dataloader())
    assert data.num_train == 1077
    originals, classes = load_split("train")
    assert torch.equal(images, (originals[indices] - 0.5) / 0.5)
    assert torch.equal(labels, classes[indices])


class Batch(LightningModule):
    """Keeps the batches that it is trained on."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_mixing_leaves_indices_alone(tmp_path):
    data, module = ImageData(batch_size=32, mixup=0.8, cutmix=1.0), Batch()
    data.with_indices = True
    quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, datamodule=data)
    labels = load_split("train")[1]
    for _, soft, indices in module.batches:
        assert soft.shape == (32, 10)
        own = labels[indices]
        other = own.flip(0)
        rest = soft.gather(1, own[:, None]) + soft.gather(1, other[:, None])
        expected = torch.where(own == other, 2.0, 1.0)
        assert torch.allclose(rest.squeeze(1), expected)


# Mixing and erasing


def mixed_labels(tmp_path, **options):
    data, module = ImageData(batch_size=64, **options), Batch()
    quiet_trainer(tmp_path, max_steps=16, limit_val_batches=0).fit(module, datamodule=data)
    return [soft for _, soft in module.batches]


def test_no_batch_is_mixed_at_probability_zero(tmp_path):
    for soft in mixed_labels(tmp_path, mixup=0.8, cutmix=1.0, mixup_prob=0.0):
        assert ((soft == 0) | (soft == 1)).all()


def test_the_switch_chooses_between_mixup_and_cutmix():
    def changed(switch):
        mix = ImageData(mixup=1.0, cutmix=1.0, switch_prob=switch).mixing.build(10)
        images = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
        return [mix(images.clone(), torch.tensor([0, 1]))[0].unique() for _ in range(20)]

    assert all(set(values.tolist()) <= {0.0, 1.0} for values in changed(1.0))
    assert all(set(values.tolist()).isdisjoint({0.0, 1.0}) for values in changed(0.0))


def test_smoothing_in_the_loss_is_smoothing_of_the_mixed_labels():
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    mixing = ImageData(mixup=0.8, batch_size=6).mixing
    losses = []
    for smoothing in (0.0, 0.1):
        np.random.seed(3)
        mix = mixing.build(5)
        mix.label_smoothing = smoothing
        soft = mix(torch.zeros(6, 1, 2, 2), labels)[1]
        own = F.cross_entropy(logits, soft, label_smoothing=0.1 - smoothing)
        losses.append((own, SoftTargetCrossEntropy()(logits, soft)))
    assert torch.allclose(losses[0][0], losses[1][1])


@pytest.mark.parametrize(("mode", "kinds"), [("const", 1), ("rand", 2), ("pixel", 5)])
def test_erased_rectangles_are_filled_as_asked(tmp_path, mode, kinds):
    for number in range(4):
        path = tmp_path / "train" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (255, 255, 255)).save(path)
    options = {"no_aug": False, "crop_padding": 1, "image_size": 32, "mean": [0.5] * 3}
    data = data_of(tmp_path, re_prob=1.0, re_mode=mode, hflip=0.0, **options)
    centre = gather(data.train_dataloader())[0][:, 0, 1:-1, 1:-1]
    for image in centre:
        erased = image[image != 0.5].unique()
        assert len(erased) >= kinds if kinds > 2 else len(erased) == 1
        assert (erased == 0).all() == (mode == "const")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_prob": 1.5}, "mixup_prob"),
        ({"switch_prob": -0.5}, "switch_prob"),
        ({"mixup": -1.0}, "mixup"),
        ({"aug_repeats": -1}, "aug_repeats"),
        ({"prefetch_factor": 0}, "prefetch_factor"),
        ({"re_prob": 2.0}, "re_prob"),
        ({"re_count": 0}, "re_count"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(DataError, match=message):
        ImageData(**options)


# Workers


@pytest.mark.parametrize(
    ("cores", "neighbours", "workers"), [(2, 1, 2), (64, 1, 8), (64, 8, 8), (16, 4, 4), (2, 4, 1)]
)
def test_cores_are_shared_by_the_processes_of_a_machine(
    tmp_path, monkeypatch, cores, neighbours, workers
):
    monkeypatch.setattr(loaders, "usable_cores", lambda: cores)
    data = data_of(write_folder(tmp_path), num_workers=None)
    data.trainer = process(0, neighbours, num_devices=neighbours)
    assert data.train_dataloader().num_workers == workers


def test_settings_of_the_workers_arrive(tmp_path):
    options = {"prefetch_factor": 5, "persistent_workers": False, "num_workers": 3}
    loader = data_of(write_folder(tmp_path), **options).train_dataloader()
    assert loader.num_workers == 3
    assert loader.prefetch_factor == 5
    assert not loader.persistent_workers
    assert not loader.pin_memory
    assert data_of(tmp_path, pin_memory=True).train_dataloader().pin_memory


# Shares


def test_evaluation_scores_each_image_once(tmp_path):
    write_folder(tmp_path, count=3)
    write_folder(tmp_path, "val", 7)
    for cache in ("none", "memory"):
        seen = []
        for rank in range(2):
            data = data_of(tmp_path, cache=cache)
            data.trainer = process(rank, 2)
            seen.append(numbers(data.val_dataloader()))
        assert sorted(map(len, seen)) == [3, 4]
        assert sorted(seen[0] + seen[1]) == list(range(7))


# Streams


@dataclass
class Shards:
    filenames: tuple[str, ...]


class FakeReader:
    """Names shards and deals them out, as timm's reader of WebDataset does, without any file."""

    dist_rank, dist_num_replicas, num_workers = 0, 1, 1

    def __init__(self, shards):
        self.split_info = Shards(tuple(f"{number}.tar" for number in range(shards)))

    def set_loader_cfg(self, num_workers):
        self.num_workers = num_workers

    def __len__(self):
        return len(self.split_info.filenames)

    def __iter__(self):
        mine = self.split_info.filenames[self.dist_rank :: self.dist_num_replicas]
        for name in mine:
            number = int(name.removesuffix(".tar"))
            yield picture(number), number % 3


def fake_stream(shards, training):
    reader = FakeReader(shards)
    dataset = IterableImageDataset(None, reader=reader)
    source = StreamSource(dataset, training, reader.split_info.filenames)
    source.class_names = list(CLASSES)
    return source


@pytest.mark.parametrize(
    ("shards", "world", "wanted", "used"), [(8, 2, 3, 3), (8, 2, 8, 4), (9, 4, 8, 2), (3, 1, 0, 0)]
)
def test_no_worker_is_left_without_shard(shards, world, wanted, used):
    # Such a worker has no batch, and the other processes would wait for it.
    source = fake_stream(shards, training=True)
    for rank in range(world):
        assert source.spread(rank, world, wanted) == used
        reader = source.dataset.reader
        assert (reader.dist_rank, reader.dist_num_replicas) == (rank, world)
        assert reader.num_workers == max(1, used)


def test_too_few_shards_to_train_on():
    with pytest.raises(DataError, match=r"3 shards.*4 processes.*--trainer\.devices"):
        fake_stream(3, training=True).spread(0, 4, 2)


@pytest.mark.parametrize(("shards", "world"), [(7, 1), (7, 2), (7, 3), (2, 3)])
def test_streams_are_scored_once(shards, world):
    source, seen = fake_stream(shards, training=False), []
    for rank in range(world):
        read = len(range(rank, shards, world)) if shards >= world else 1
        assert source.spread(rank, world, 8) == read
        images = source.images(
            Preprocessing(image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3), False
        )
        seen += numbers([(image[None],) for image, _ in images])
    assert sorted(seen) == list(range(shards))


def test_streams_have_neither_repeats_nor_indices(monkeypatch):
    monkeypatch.setattr("gpd_cli.data.opening.find_spec", lambda module: module)
    with pytest.raises(DataError, match=r"aug_repeats.*streamed"):
        ImageData("wds/name", root=".", aug_repeats=3)
    reader = FakeReader(2)
    dataset = IterableImageDataset(None, reader=reader)
    monkeypatch.setattr("gpd_cli.data.opening.create_dataset", lambda *args, **kwargs: dataset)
    data = ImageData("tfds/name", root=".", classes=3, num_workers=0, val_fraction=0.0)
    data.with_indices = True
    with pytest.raises(DataError, match=r"streamed data set does not number its images"):
        data.train_dataloader()


def write_shards(root, shards=4, per_shard=6, split="train"):
    for shard in range(shards):
        with tarfile.open(root / f"{split}-{shard:04}.tar", "w") as archive:
            for position in range(per_shard):
                number = shard * per_shard + position
                image = io.BytesIO()
                picture(number, split).save(image, "png")
                for suffix, content in (("png", image.getvalue()), ("cls", b"%d" % (number % 3))):
                    entry = tarfile.TarInfo(f"{number:05}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return root


def shard_data(root, **options):
    settings = {
        "train_split": "train-{0000..0003}.tar|24",
        "val_split": "val-{0000..0002}.tar",
        "classes": 3,
    }
    return data_of(root, "wds/images", **(settings | options))


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path)
    return write_shards(tmp_path, 3, 5, split="val")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_webdataset(shards, workers):
    data = shard_data(shards, num_workers=workers)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 6
    passes = [numbers(loader) for _ in range(2)]
    for seen in passes:
        assert sorted(seen) == list(range(24))
    assert passes[0] != passes[1]
    assert sorted(numbers(data.val_dataloader())) == list(range(15))
    images, labels = gather(data.val_dataloader())
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long() % 3, labels)


@pytest.mark.parametrize("workers", [0, 3, None])
def test_images_of_shards_are_predicted_in_their_order(shards, monkeypatch, workers):
    # Rows have no other number than their place.
    monkeypatch.setattr(loaders, "usable_cores", lambda: 3)
    data = shard_data(shards, num_workers=workers, test_split="val-{0000..0002}.tar")
    data.setup("predict")
    assert numbers(data.predict_dataloader()) == list(range(15))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_shards_is_that_of_seed_and_epoch(shards, workers):
    def order(epoch, draws):
        torch.manual_seed(1)
        data = shard_data(shards, num_workers=workers, persistent_workers=False)
        data.trainer = process(epoch=epoch)
        loader = data.train_dataloader()
        torch.rand(draws)
        return numbers(loader)

    assert order(3, 0) == order(3, 5)
    assert order(3, 0) != order(4, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_dealt_out_over_processes(shards, workers):
    trained, scored, lengths = [], [], []
    for rank in range(2):
        torch.manual_seed(0)
        data = shard_data(shards, num_workers=workers, batch_size=3)
        data.setup("fit")
        data.trainer = process(rank, 2)
        loader = data.train_dataloader()
        trained += numbers(loader)
        lengths.append(len(loader))
        scored += numbers(data.val_dataloader())
    assert lengths == [4, 4]
    assert sorted(trained) == list(range(24))
    assert sorted(scored) == list(range(15))


def test_mistakes_with_shards(shards):
    with pytest.raises(DataError, match=r"does not say how many.*--data\.train_samples"):
        shard_data(shards, train_split="train-{0000..0003}.tar").setup("fit")
    counted = shard_data(shards, train_split="train-{0000..0003}.tar", train_samples=24)
    assert len(counted.train_dataloader()) == 6
    with pytest.raises(DataError, match=r"no shard '.*train-0004\.tar'"):
        shard_data(shards, train_split="train-{0000..0004}.tar|30").setup("fit")
    with pytest.raises(DataError, match=r"no split 'dev'"):
        shard_data(shards, val_split="dev").setup("fit")


_CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype: {class_label: {names: {"0": a, "1": b, "2": c}}}
  splits:
  - {name: train, num_bytes: 1, num_examples: 24}
  - {name: validation, num_bytes: 1, num_examples: 10}
---
"""


@pytest.fixture
def tables(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    for split, count, parts in (("train", 24, 4), ("validation", 10, 2)):
        rows = {
            "image": [picture(number, split) for number in range(count)],
            "label": [number % 3 for number in range(count)],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        for part in range(parts):
            path = tmp_path / "tables" / "data" / f"{split}-{part:05}-of-{parts:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.shard(parts, part, contiguous=True).to_parquet(path)
    (tmp_path / "tables" / "README.md").write_text(_CARD)
    return tmp_path


def table_data(folder, scheme, **options):
    return data_of(folder / "cache", f"{scheme}/{folder / 'tables'}", **options)


def test_tables_of_hugging_face(tables):
    data = table_data(tables, "hfds")
    data.setup("fit")
    assert data.class_names == list(CLASSES)
    assert sorted(numbers(data.train_dataloader())) == list(range(24))
    assert numbers(data.val_dataloader()) == list(range(10))
    held = table_data(tables, "hfds", val_split=None, val_fraction=0.25, cache="memory")
    assert len(numbers(held.train_dataloader())) == 16  # of 18, in whole batches
    assert len(numbers(held.val_dataloader())) == 6
    with pytest.raises(DataError, match=r"no split 'dev'"):
        table_data(tables, "hfds", val_split="dev").setup("fit")


@pytest.mark.slow  # the library waits for seconds, to fill its buffer
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_tables_of_hugging_face(tables, workers):
    data = table_data(tables, "hfids", num_workers=workers)
    data.setup("fit")
    assert data.class_names == list(CLASSES)
    loader = data.train_dataloader()
    assert len(loader) == 6
    passes = [numbers(loader) for _ in range(2)]
    for seen in passes:
        assert sorted(seen) == list(range(24))
    assert passes[0] != passes[1]
    assert sorted(numbers(data.val_dataloader())) == list(range(10))


@STREAMS_TABLES
def test_streamed_tables_are_predicted_in_their_order(tables):
    data = table_data(tables, "hfids", num_workers=2, test_split="validation")
    data.setup("predict")
    assert numbers(data.predict_dataloader()) == list(range(10))


@STREAMS_TABLES
def test_streamed_tables_are_dealt_out_over_processes(tables):
    trained, scored, lengths = [], [], []
    for rank in range(2):
        torch.manual_seed(0)
        data = table_data(tables, "hfids", batch_size=3, num_workers=8)
        data.setup("fit")
        data.trainer = process(rank, 2)
        loader = data.train_dataloader()
        assert loader.num_workers == 2
        trained += numbers(loader)
        lengths.append(len(loader))
        scored += numbers(data.val_dataloader())
    assert lengths == [4, 4]
    assert sorted(trained) == list(range(24))
    assert sorted(scored) == list(range(10))


@STREAMS_TABLES
def test_mistakes_with_streamed_tables(tables):
    (tables / "tables" / "README.md").unlink()
    with pytest.raises(DataError, match=r"does not say how many.*--data\.train_samples"):
        table_data(tables, "hfids").setup("fit")
    with pytest.raises(DataError, match=r"does not name its classes.*--data\.classes"):
        table_data(tables, "hfids", train_samples=24).setup("fit")
    with pytest.raises(DataError, match=r"no split 'dev'"):
        table_data(tables, "hfids", train_samples=24, classes=3, val_split="dev").setup("fit")


# Two processes

_SCRIPT = """
import json, sys
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from gpd_cli.data import ImageData

class Record(LightningModule):
    def __init__(self):
        super().__init__()
        self.train_seen, self.val_seen = [], []
        self.weight = torch.nn.Parameter(torch.zeros(()))
    def numbers(self, images):
        return (images[:, 0, 0, 0] * 255).round().int().tolist()
    def training_step(self, batch, batch_idx):
        self.train_seen.append(self.numbers(batch[0]))
        return self.weight * batch[0].mean()
    def validation_step(self, batch, batch_idx):
        self.val_seen += self.numbers(batch[0])
        self.log("size", float(len(batch[0])), on_epoch=True, sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
seed_everything(0, verbose=False)
module = Record()
trainer = Trainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", num_sanity_val_steps=0,
    logger=False, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, check_val_every_n_epoch=2, default_root_dir=folder,
)
trainer.fit(module, datamodule=ImageData(**options))
seen = {"train": module.train_seen, "val": module.val_seen}
(folder / f"seen{trainer.global_rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "cached", "repeated", "wds", "hfids"])
def test_two_processes_see_different_images(tmp_path, kind, request):
    if kind == "wds":
        data = shard_data(request.getfixturevalue("shards"), num_workers=2, batch_size=3)
    elif kind == "hfids":
        root = request.getfixturevalue("tables")
        data = table_data(root, "hfids", num_workers=2, batch_size=3)
    else:
        write_folder(write_folder(tmp_path, count=24), "val", 15)
        extra = {"cached": {"cache": "memory"}, "repeated": {"aug_repeats": 3}}.get(kind, {})
        data = data_of(tmp_path, num_workers=1, batch_size=3, **extra)
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    result = subprocess.run(
        [sys.executable, script, tmp_path, json.dumps(dict(data.hparams))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(2)]
    steps = [part["train"] for part in seen]
    assert [len(batches) for batches in steps] == [8, 8]
    for half in (slice(0, 4), slice(4, 8)):
        both = [number for batches in steps for batch in batches[half] for number in batch]
        expected = [3] * 8 if kind == "repeated" else [1] * 24
        assert list(Counter(both).values()) == expected
    assert steps[0][:4] != steps[0][4:]
    scored = sorted(seen[0]["val"] + seen[1]["val"])
    assert scored == list(range(10 if kind == "hfids" else 15))
