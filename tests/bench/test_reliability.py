"""A seeded part of `make fuzz` and of `make chaos`, in processes of their own, which they fork."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import importable


def run(folder: Path, module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": importable(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_broken_files_and_options_are_refused_in_a_sentence(tmp_path: Path) -> None:
    table = run(tmp_path, "bench.fuzz", "--count", "2", "--seed", "3").splitlines()
    assert len(table) == 7
    assert sum(int(line.split()[2]) for line in table[1:]) >= 4  # refused; others did no harm


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_and_a_lost_folder_costs_no_checkpoint(
    tmp_path: Path,
) -> None:
    arguments = ["--kills", "2", "--a_run", "2", "--ranks", "1", "--faults", "forbid"]
    lines = run(tmp_path, "bench.chaos", *arguments).splitlines()
    assert lines[0].endswith("equal bit for bit")
    assert "nothing lost" in lines[1]
