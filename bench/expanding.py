"""``python -m bench.expanding``: time and memory of `gpd_cli.expand`, including the certificate."""

from __future__ import annotations

import argparse
import statistics
import time

from gpd_cli.cli.cpu_memory import use_huge_pages

use_huge_pages()  # as the command does, before torch is imported

import torch

from bench.fresh_process import in_fresh_process
from bench.speed.cost import NUMBER
from bench.speed.memory import forget_peak, peak
from gpd_cli import expand
from gpd_cli.models import create_model
from gpd_cli.training.subnormals import flushed_subnormals

STUDENTS = ("resnet18", "resnet50", "vit_tiny_patch16_224", "vit_base_patch16_224")
_CPU = torch.device("cpu")
_COLUMNS = ("seconds", "of CPU", "peak", "merged", "branches")


@flushed_subnormals()  # as the command does
def measure(student: str, branches: int, size: int) -> tuple[float, float, float, float, float]:
    """Expand a student at ratio 2 in this process, and measure time and memory.

    Args:
        student: name of the student, as ``gpd expand`` takes it.
        branches: number of branches, see `gpd_cli.expand`.
        size: height and width of the images in pixels.

    Returns:
        Wall-clock seconds; CPU seconds; and in MiB: peak memory above that of the process before,
        size of the teacher's weights with branches merged, and size with all branches.
    """
    network = create_model(student)
    sample = torch.zeros(2, 3, size, size)
    forget_peak(_CPU)
    before, start, computed = peak(_CPU), time.perf_counter(), time.process_time()
    pair = expand(network, sample=sample, branches=branches)
    seconds = time.perf_counter() - start, time.process_time() - computed
    most = peak(_CPU) - before
    numbers = [p.numel() for name, p in pair.named_parameters() if ".branches." not in name]
    merged, trained = sum(numbers), sum(parameter.numel() for parameter in pair.parameters())
    return *seconds, most / 2**20, NUMBER * merged / 2**20, NUMBER * trained / 2**20


def main() -> None:
    """Print medians for each student over several rounds, each of which runs in a new process."""
    parser = argparse.ArgumentParser(prog="bench.expanding", description=__doc__)
    parser.add_argument("students", nargs="*", default=STUDENTS)
    parser.add_argument("--branches", type=int, default=6)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{threads} thread(s), {options.branches} branches, {options.size} pixels, MiB")
    print(" ".join(f"{title:>8}" for title in _COLUMNS), "student")
    for student in options.students:
        rounds = [
            in_fresh_process(measure, student, options.branches, options.size)
            for _ in range(options.rounds)
        ]
        medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
        print(" ".join(f"{median:8.1f}" for median in medians), student, flush=True)


if __name__ == "__main__":
    main()
