"""Cases of each kind, which consist of a damaged file or option and of a command to run on it."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from bench.fuzz.damage import damaged_bytes, damaged_text, damaged_value
from gpd_cli.__main__ import main

SIGN = "code-was-run"
OUTPUT = "out.pth"
SHORT = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.max_steps", "2"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
]
TRAIN = [
    *("--model.student", "bench.fuzz.student.Student", "--model.num_classes", "10"),
    *("--model.student_args", "{in_chans: 1}", "--model.ratio", "2", "--model.branches", "2"),
    *("--data.image_size", "16", "--data.batch_size", "8", "--trainer.log_every_n_steps", "1"),
]
_VALUES = (
    *("-1", "0", "1", "3", "1e9", "1000000000", "-1e9", "nan", "inf", "-inf", "0.5", "1e-300"),
    *("text", "''", "null", "true", "[]", "[1]", "[1, 2]", "{}", "{a: 1}", "[[[[]]]]", "*x", "a.b"),
    *("[nan, 1]", "[1, 0]", "999999999999999999999", "&a [*a]", "\u2028", "é", "../..", "1.5"),
)
_OF_TRAINER = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches"),
    *("limit_val_batches", "val_check_interval", "check_val_every_n_epoch", "log_every_n_steps"),
    *("num_sanity_val_steps", "accumulate_grad_batches", "gradient_clip_val", "precision"),
    *("gradient_clip_algorithm", "devices", "accelerator", "overfit_batches", "fast_dev_run"),
    *("deterministic", "detect_anomaly", "save_every_n_steps", "save_every_n_minutes", "callbacks"),
    *("logger", "profiler", "plugins", "inference_mode", "use_distributed_sampler", "barebones"),
    *("reload_dataloaders_every_n_epochs", "enable_progress_bar", "enable_checkpointing"),
)


@dataclass(frozen=True)
class Case:
    """A damaged file or option, and the command that is run on it.

    Args:
        arguments: the command line.
        damage: description of the damage.
        same: whether a command that accepts the damaged input has to write the same output as
            without the damage.
    """

    arguments: list[str]
    damage: str
    same: bool = False


@dataclass(frozen=True)
class Base:
    """The intact files from which damaged ones are made.

    Args:
        checkpoint: path of a checkpoint of `fit`.
        expanded: path of a file of `expand`.
        student: path of the extracted student's weights, a ``.pth`` file.
        config: text of the run's configuration.
        images: path of a folder of images.
    """

    checkpoint: Path
    expanded: Path
    student: Path
    config: str
    images: Path

    @classmethod
    def made_in(cls, folder: Path) -> Base:
        """Make the files in a folder, by running `fit`, `expand` and `extract` once."""
        run = folder / "runs" / "gpd" / "version_0"
        found = cls(
            run / "checkpoints" / "last.ckpt",
            folder / "expanded.safetensors",
            folder / "student.pth",
            "",
            folder / "images",
        )
        model = TRAIN[:8]
        commands = (
            ["fit", *TRAIN, *SHORT, "--trainer.max_steps", "4", "--trainer.max_epochs", "2"],
            ["expand", *model, "--model.branches", "2", "--output", str(found.expanded)],
            ["extract", "--ckpt_path", str(found.checkpoint), "--output", str(found.student)],
        )
        # The commands run in this process, so that forked processes have everything imported.
        with (
            chdir(folder),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()) as errors,
        ):
            for arguments in commands:
                if main(arguments) != 0:
                    raise RuntimeError(f"{arguments}: {errors.getvalue()}")
        noise = np.random.default_rng(0)
        found.images.mkdir()
        for number, suffix in enumerate((".png", ".jpg", ".bmp", ".webp", ".tiff", ".jpeg")):
            pixels = noise.integers(0, 255, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(found.images / f"{number}{suffix}")
        return dataclasses.replace(found, config=(run / "config.yaml").read_text())


def checkpoint(draw: random.Random, base: Base, folder: Path) -> Case:
    """A checkpoint of `fit` with damaged bytes or content, given to a command."""
    path = folder / "damaged.ckpt"
    content, how, fine = _archive(draw, base.checkpoint, folder)
    path.write_bytes(content)
    command = draw.choice(("extract", "extract", "extract", "fit", "fit", "validate", "predict"))
    arguments = {
        "extract": ["extract", "--ckpt_path", str(path), "--output", OUTPUT],
        "fit": ["fit", *TRAIN, *SHORT, "--trainer.max_steps", "5", "--trainer.max_epochs", "3"],
        "validate": ["validate", *SHORT[:2], *SHORT[-2:]],
        "predict": ["predict", *SHORT[:2], "--output", "out.csv"],
    }[command]
    if command != "extract":
        arguments += ["--ckpt_path", str(path)]
    return Case(arguments, f"{command}, {how}", same=not fine)


def expanded(draw: random.Random, base: Base, folder: Path) -> Case:
    """A file of `expand` with damaged bytes or description, given to `extract`."""
    path = folder / "damaged.safetensors"
    fine = False
    if draw.random() < 0.5:
        content, how = damaged_bytes(draw, base.expanded.read_bytes())
        path.write_bytes(content)
    else:
        with safe_open(base.expanded, framework="pt") as file:
            entry = json.loads(file.metadata()["gpd"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        while True:
            value, how, fine = damaged_value(draw, entry, str(folder / SIGN))
            try:
                text = json.dumps(value)
            except TypeError:  # the damage was code, which JSON cannot hold
                continue
            break
        save_file(tensors, path, {"gpd": text})
    arguments = ["extract", "--ckpt_path", str(path), "--output", OUTPUT]
    return Case(arguments, how, same=not fine)


def weights(draw: random.Random, base: Base, folder: Path) -> Case:
    """Damaged weights of a student, given to `expand`."""
    content, how, fine = _archive(draw, base.student, folder)
    path = folder / "damaged.pth"
    path.write_bytes(content)
    arguments = ["expand", *TRAIN[:8], "--model.student_weights", str(path)]
    arguments += ["--output", "out.safetensors"]
    return Case(arguments, how, same=not fine)


def image(draw: random.Random, base: Base, folder: Path) -> Case:
    """A damaged image, or a folder that also holds unusual things, given to `predict`."""
    shutil.copytree(base.images, folder / "images" / "some")
    path = draw.choice(sorted((folder / "images" / "some").iterdir()))
    odd: dict[str, Callable[[], Any]] = {
        "a link that leads back": lambda: (path.parent / "loop").symlink_to(".."),
        "a broken link": lambda: (path.parent / "gone.png").symlink_to("nowhere.png"),
        "a link to itself": lambda: (path.parent / "me.png").symlink_to("me.png"),
        "a named pipe": lambda: os.mkfifo(path.parent / "pipe.png"),
        "a folder with an image's name": lambda: (path.parent / "folder.png").mkdir(),
        "an empty file": lambda: path.write_bytes(b""),
        "text": lambda: path.write_text("no image"),
        "an image of 30,000 x 30,000 pixels": lambda: path.write_bytes(_large()),
        "a name that is no text": lambda: path.rename(path.with_name(os.fsdecode(b"\xff.png"))),
    }
    if draw.random() < 0.15:
        how = draw.choice(sorted(odd))
        odd[how]()
    else:
        content, how = damaged_bytes(draw, path.read_bytes())
        path.write_bytes(content)
        how = f"{path.suffix}, {how}"
    arguments = ["predict", *SHORT[:2], "--ckpt_path", str(base.checkpoint), "--images", "images"]
    return Case([*arguments, "--output", "out.csv", "--data.num_workers", "0"], how)


def configuration(draw: random.Random, base: Base, folder: Path) -> Case:
    """A damaged configuration of a run, given to `fit`."""
    text, how = damaged_text(draw, base.config)
    (folder / "damaged.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    return Case(["fit", "-c", "damaged.yaml", *SHORT], how)


def option(draw: random.Random, base: Base, folder: Path) -> Case:
    """An option of `fit` with a value that it may not expect."""
    from gpd_cli.data import ImageData
    from gpd_cli.training.module import GapPreservingDistillation
    from gpd_cli.training.optimizers import OptimizerSettings

    names = [f"--trainer.{name}" for name in _OF_TRAINER]
    names += [f"--data.{name}" for name in inspect.signature(ImageData).parameters]
    names += [f"--model.{name}" for name in inspect.signature(GapPreservingDistillation).parameters]
    names += [f"--model.optimizer.{field.name}" for field in dataclasses.fields(OptimizerSettings)]
    names += ["--seed_everything", "--ckpt_path", "-c", "--resume"]
    name, value = draw.choice(names), draw.choice(_VALUES)
    return Case(["fit", *TRAIN, *SHORT, f"{name}={value}"], f"{name}={value}")


KINDS: dict[str, Callable[[random.Random, Base, Path], Case]] = {
    "checkpoint": checkpoint,
    "expanded": expanded,
    "weights": weights,
    "image": image,
    "configuration": configuration,
    "option": option,
}


def _archive(draw: random.Random, path: Path, folder: Path) -> tuple[bytes, str, bool]:
    """Damage the bytes of a file made by ``torch.save``, or its content, which is then saved again.

    Returns:
        The bytes of the damaged file, a description of the damage, and whether a command may accept
        the damage and write another output.
    """
    if draw.random() < 0.35:
        content, how = damaged_bytes(draw, path.read_bytes())
        return content, how, False
    value = torch.load(path, weights_only=True)
    value, how, fine = damaged_value(draw, value, str(folder / SIGN))
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue(), how, fine


def _large() -> bytes:
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "png")
    return file.getvalue()
