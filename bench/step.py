"""Time a joint training step against plain training of both networks, interleaved in one run.

python bench/step.py [--student resnet18 --size 64 --batch 16 --branches 1 --rounds 10]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does, before torch is imported

import torch
import torch.nn.functional as F
from torch import nn

from gpd_cli import expand
from gpd_cli.distill.objective import Objective
from gpd_cli.models import create_model
from gpd_cli.teacher.build import merged_teacher


def main() -> None:
    """Print the median time of each step, and that of the joint step relative to both others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=2)
    parser.add_argument("--branches", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.set_flush_denormal(True)  # as the command does, too
    torch.manual_seed(0)
    device = torch.device(options.device)
    student = create_model(options.student)
    sample = torch.zeros(2, 3, options.size, options.size)
    pair = expand(student, ratio=options.ratio, branches=options.branches, sample=sample).train()
    wide = merged_teacher(pair)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    labels = torch.randint(0, 1000, (options.batch,), device=device)
    objective = Objective()

    def joint(network: nn.Module) -> torch.Tensor:
        narrow, teacher = network(images)
        return torch.stack(list(objective.terms(narrow, teacher, labels).values())).sum()

    def plain(network: nn.Module) -> torch.Tensor:
        return F.cross_entropy(network(images), labels)

    steps = {
        "student alone": _step(student.to(device), plain),
        "wide alone": _step(wide.to(device), plain),
        "joint": _step(pair.to(device), joint),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # warm-up
                times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        print(f"{name:14} {1000 * statistics.median(values):8.1f} ms")
    ratios = [
        j / (s + w)
        for s, w, j in zip(times["student alone"], times["wide alone"], times["joint"], strict=True)
    ]
    print(f"joint / (student + wide): {statistics.median(ratios):.3f} (median of {len(ratios)})")


def _step(network: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
