"""Short runs of `fit` in forked processes, on digits that are saved as image files."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bench.chaos.strikes import PLAN
from gpd_cli.data.digits import load_split

CONFIG = """
model:
  student: resnet18
  student_args: {in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], drop_path_rate: 0.3}
  num_classes: 10
  ratio: 2
  branches: 3
  optimizer: {lr: 0.05, warmup_epochs: 1}
data: {dataset: folder, root: images, image_size: 16, in_chans: 1, batch_size: 16, mixup: 0.4,
  cutmix: 1.0, auto_augment: rand-m9-mstd0.5, re_prob: 0.3, val_split: null, val_fraction: 0.2}
trainer: {accelerator: cpu, max_epochs: 3, limit_train_batches: 5, limit_val_batches: 1,
  log_every_n_steps: 2, save_every_n_steps: 2,
  callbacks: [{class_path: gpd_cli.EMA}, {class_path: bench.chaos.strikes.Strike}]}
"""
STEPS = 15


def prepare(folder: Path) -> None:
    """Write configuration and images of the runs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(CONFIG)
    pixels, labels = load_split("train")
    for number, (image, label) in enumerate(zip(pixels[:300], labels[:300], strict=True)):
        path = folder / "images" / "train" / str(int(label)) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.asarray(image, dtype=np.float64)
        grey = grey.reshape(grey.shape[-2:]) * (255 / max(grey.max(), 1e-9))
        Image.fromarray(grey.astype(np.uint8)).save(path)


def fit(
    folder: Path, arguments: list[str], ranks: int = 1, plan: str = "", seconds: float = 240
) -> tuple[list[int], str]:
    """Run `fit`, and wait for all its processes.

    Args:
        folder: folder to run in.
        arguments: arguments of the command `fit`.
        ranks: number of processes that train together.
        plan: the disturbance, in the form of `bench.chaos.strikes.PLAN`; empty for none.
        seconds: time limit in seconds, after which the processes are killed.

    Returns:
        The exit code of each process, negative for the signal that killed it, and the output of all
        processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    log.unlink(missing_ok=True)
    children = [_forked(folder, arguments, rank, ranks, port, plan, log) for rank in range(ranks)]
    codes: dict[int, int] = {}
    start = time.monotonic()
    while len(codes) < ranks:
        for child in children:
            if child in codes:
                continue
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - start > seconds:
                os.kill(child, 9)
        time.sleep(0.02)
    return [codes[child] for child in children], log.read_text(errors="replace")


def _forked(
    folder: Path, arguments: list[str], rank: int, ranks: int, port: int, plan: str, log: Path
) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from gpd_cli.__main__ import main

        os.chdir(folder)
        os.environ[PLAN] = plan
        if ranks > 1:
            # The environment variables that torchrun sets.
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            told |= {"LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "chaos"}
            os.environ |= {name: str(value) for name, value in told.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        code = main(["fit", *arguments])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        os.write(2, f"Traceback: {error!r}\n".encode())
    finally:
        os._exit(code)
