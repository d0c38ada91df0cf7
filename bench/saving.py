"""``python bench/saving.py resnet18``: the time to write a checkpoint, and its share of a run."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch import nn

from gpd_cli.files import save_archive
from gpd_cli.teacher.networks import with_teacher

INTERVAL = 15 * 60  # default interval between checkpoints within an epoch, in seconds
TIMES = 3  # number of times that the checkpoint is written


def main() -> None:
    """Write weights, their average and momentum as `fit` does, and print how long this takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", nargs="?", default="resnet18", help="a model of timm (resnet18)")
    parser.add_argument("--ratio", type=float, default=2)
    parser.add_argument("--branches", type=int, default=6)
    chosen = parser.parse_args()
    network = timm.create_model(chosen.student)
    pair = with_teacher(network, (3, 64, 64), ratio=chosen.ratio, branches=chosen.branches)
    content = {"state_dict": pair.state_dict(), "average": copied(pair), "momentum": copied(pair)}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, taken = Path(folder, "last.ckpt"), []
        for _ in range(TIMES):
            start = time.perf_counter()
            save_archive(path, content)
            taken.append(time.perf_counter() - start)
        size = path.stat().st_size / 2**20
    print(
        f"{chosen.student}, ratio {chosen.ratio:g}, {chosen.branches} branches, with an average: "
        f"{size:.0f} MiB, {min(taken):.1f} to {max(taken):.1f} s, "
        f"{100 * max(taken) / INTERVAL:.2f} % of {INTERVAL // 60} minutes"
    )


def copied(network: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a network's state dict, which stands for the average or the momentum."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


if __name__ == "__main__":
    main()
