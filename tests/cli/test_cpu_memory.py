import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gpd_cli.__main__ import main
from runs import ALONE, fit, run_folder

REPEATED = """
import resource, sys
from gpd_cli.cli.cpu_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
def step():
    return [torch.ones(1 << 22) for _ in range(4)]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
counts = []
for _ in range(3):
    before = faults()
    for _ in range(10):
        step()
    counts.append(faults() - before)
print(min(counts))
"""


def page_faults(argument: str, **environment: str) -> int:
    """Page faults of ten steps that allocate 64 MiB each, in a process of its own.

    The least of three counts, since the heap may grow once more after the first steps.
    """
    run = subprocess.run(
        [sys.executable, "-c", REPEATED, argument],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    assert page_faults("keep") < 1000
    # By default the library gives large tensors back or not, as they happen to lie in its heap;
    # with a threshold it does so each time.
    assert page_faults("give back", MALLOC_MMAP_THRESHOLD_="131072") > 1000


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_what_the_environment_says_stands() -> None:
    assert page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > 1000


def test_only_training_on_a_cpu_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[str] = []
    monkeypatch.setattr("gpd_cli.cli.command_line.keep_freed_memory", lambda: kept.append("fit"))
    assert fit(tmp_path, *ALONE) == 0
    assert kept == ["fit"]
    last = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    assert main(["test", "--ckpt_path", str(last)]) == 0
    assert kept == ["fit"]
