"""A seeded part of `make fuzz` and of `make chaos`, in processes of their own, which they fork.

What `make chaos` counts and reports is tested without training.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench.chaos.__main__ import main
from bench.chaos.kills import kill_and_compare
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


def play_runs(monkeypatch: pytest.MonkeyPatch, codes: Iterable[int]) -> None:
    """Have runs end with these codes, without training anything."""
    ends = iter(codes)
    monkeypatch.setattr("bench.chaos.kills.prepare", lambda folder: None)
    monkeypatch.setattr("bench.chaos.kills.differing", lambda one, other: [])
    monkeypatch.setattr("bench.chaos.kills.fit", lambda *_: ([next(ends)], ""))


def test_only_kills_that_happened_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_runs(monkeypatch, [-signal.SIGKILL, 0])
    happened, what, different = kill_and_compare(
        tmp_path, random.Random(0), kills=3, ranks=1, whole={1: tmp_path}
    )
    assert (happened, different) == (1, [])
    killed, ended = what.partition(", ")[2].split("), ")
    assert killed.startswith(("kill at step", "save at step"))
    assert ended.startswith("ended before: ")


def test_kills_that_did_not_happen_are_not_tested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--kills", "2", "--ranks", "1", "--faults"]
    # The undisturbed run; one that is killed once and then ends; one that is killed and resumed.
    play_runs(monkeypatch, [0, -signal.SIGKILL, 0, -signal.SIGKILL, 0])
    assert main(arguments) == 0
    play_runs(monkeypatch, [0] * 5)  # no run lives until its kill
    assert main(arguments) == 1
    assert "not tested: only 0 of 2 kills happened" in capsys.readouterr().out


def test_a_disk_that_cannot_be_mounted_is_not_tested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.chaos.disks.prepare", lambda folder: folder.mkdir())
    monkeypatch.setattr("bench.chaos.disks._mount", lambda folder: False)
    assert main(["--kills", "0", "--faults", "fill"]) == 1
    assert capsys.readouterr().out.startswith("fill: not tested")


def test_a_run_has_to_be_killed_at_least_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--a_run", "0"])
    assert "--a_run is 0" in capsys.readouterr().err
