"""Which checkpoint is the newest, whatever copying has made of the files' times."""

import json
import os
from contextlib import chdir
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gpd_cli.cli.resume import newest_checkpoint, newest_of_all_runs, resumed_run
from gpd_cli.errors import GpdError


def write(
    run: Path, name: str, step: int, age: int, start: str | None = None, from_step: int = 0
) -> Path:
    """A checkpoint in a run's folder, so many seconds old, of a run that was started at a time."""
    path = run / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"epoch": 0, "global_step": step, "state_dict": {"weight": torch.zeros(1000)}}
    torch.save(content, path)
    os.utime(path, (1_700_000_000 - age,) * 2)
    (run / "config.yaml").touch()
    if start is not None:
        entries = [
            {"time": "2020-01-01T00:00:00+00:00", "from_step": 0},
            {"time": start, "from_step": from_step},
        ]
        (run / "environment.json").write_text(json.dumps(entries))
    return path


def test_the_newest_checkpoint_of_a_run_has_the_most_updates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copied folder has the files' times in any order."""
    write(tmp_path, "best", 40, 0)
    last = write(tmp_path, "last", 100, 5)
    assert newest_checkpoint(tmp_path) == last
    arguments, run = resumed_run(["fit", "--resume", str(tmp_path)])
    assert arguments[-1] == str(last)
    assert run == tmp_path
    assert f"gpd: going on from {last}" in capfd.readouterr().err


def test_among_as_many_updates_the_time_decides(tmp_path: Path) -> None:
    """Of an epoch best.ckpt is written first."""
    write(tmp_path, "best", 40, 5)
    last = write(tmp_path, "last", 40, 0)
    assert newest_checkpoint(tmp_path) == last


def test_what_a_run_that_was_put_back_had_made_beyond_comes_last(tmp_path: Path) -> None:
    """It went on from best.ckpt, at 2023-11-14T22:13:10Z: 10 seconds before the age 0."""
    start = ("2023-11-14T22:13:10+00:00", 40)
    stopped = write(tmp_path, "stopped", 120, 20)
    best = write(tmp_path, "best", 40, 30, *start)
    assert newest_checkpoint(tmp_path) == best
    last = write(tmp_path, "last", 50, 5)
    assert newest_checkpoint(tmp_path) == last
    last.unlink()
    best.unlink()
    assert newest_checkpoint(tmp_path) == stopped


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    best = write(tmp_path, "best", 40, 0)
    last = write(tmp_path, "last", 100, 5)
    content = bytearray(last.read_bytes())
    middle = len(content) // 2  # among the weights
    content[middle] ^= 1
    last.write_bytes({"cut": content[:middle], "bit": content, "empty": b""}[damage])
    assert newest_checkpoint(tmp_path) == best
    assert "last.ckpt is damaged" in capfd.readouterr().err


def test_checkpoints_that_tell_no_updates_come_last(tmp_path: Path) -> None:
    write(tmp_path, "last", 100, 5)
    other = tmp_path / "checkpoints" / "mine.ckpt"
    other.write_text("something else")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "last.ckpt"
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    assert newest_checkpoint(tmp_path) == other


def test_the_last_checkpoint_is_of_the_run_that_was_started_last(tmp_path: Path) -> None:
    """Which may have fewer updates behind it than one before."""
    write(tmp_path / "r" / "version_9", "last", 900, 0, "2024-01-01T09:00:00+02:00")
    newest = write(tmp_path / "r" / "version_10", "last", 100, 5, "2024-01-01T08:00:00+00:00")
    write(tmp_path / "r" / "version_10", "best", 50, 0)
    (tmp_path / "r" / "version_11").mkdir()  # which was stopped before its first checkpoint
    assert newest_of_all_runs({"save_dir": str(tmp_path), "name": "r"}) == str(newest)


def test_without_their_starts_the_files_times_tell_runs_apart(tmp_path: Path) -> None:
    newest = write(tmp_path / "r" / "version_0", "last", 100, 0)
    other = tmp_path / "r" / "version_1"
    write(other, "last", 900, 5)
    for broken in ("", "[]", "{}", '[{"time": "noon", "from_step": 0}]', "[3]"):
        (other / "environment.json").write_text(broken)
        assert newest_of_all_runs({"save_dir": str(tmp_path), "name": "r"}) == str(newest)


def test_folders_without_a_number_are_no_versions(tmp_path: Path) -> None:
    start = "2024-01-01T09:00:00+02:00"
    newest = write(tmp_path / "r" / "version_10", "last", 100, 5, start)
    write(tmp_path / "r" / "version_9", "last", 200, 5, "2024-01-01T08:00:00+02:00")
    for name in ("version_10_backup", "version_10 (copy)", "version_", "version_x", "version_²"):
        write(tmp_path / "r" / name, "last", 100, 0, start)
    assert resumed_run(["fit", "--resume", str(tmp_path / "r")])[1] == newest.parents[1]
    assert newest_of_all_runs({"save_dir": str(tmp_path), "name": "r"}) == str(newest)


def test_a_copy_alone_is_no_version_but_is_resumed_by_its_own_name(tmp_path: Path) -> None:
    copy = write(tmp_path / "version_0 (copy)", "last", 100, 0).parents[1]
    with pytest.raises(GpdError, match="give the folder of a run"):
        resumed_run(["fit", "--resume", str(tmp_path)])
    assert resumed_run(["fit", "--resume", str(copy)])[1] == copy


def test_a_run_is_resumed_on_its_own_data_from_any_folder(tmp_path: Path) -> None:
    """Its configuration has a relative path, which may mean other images elsewhere."""
    for name in ("one", "two"):
        (tmp_path / name / "data").mkdir(parents=True)
    own = str(tmp_path / "one" / "data")
    last = write(tmp_path / "one" / "run", "last", 8, 0)
    content = torch.load(last, weights_only=True)
    content |= {"gpd": {"images": {"root": own}}, "datamodule_hyper_parameters": {"root": "data"}}
    torch.save(content, last)

    def data(*options: str) -> list[str]:
        arguments, _ = resumed_run(["fit", "--resume", str(tmp_path / "one" / "run"), *options])
        return [v for k, v in pairwise(arguments) if k == "--data.root"]

    with chdir(tmp_path / "one"):
        assert data() == []
    with chdir(tmp_path / "two"):
        assert data() == [own]
        assert data("--data.root", "data") == ["data"]


def test_no_run_goes_on_from_weights_alone(tmp_path: Path) -> None:
    """A user's callback may write such files, later than last.ckpt."""
    last = write(tmp_path, "last", 40, 5)
    content = torch.load(last, weights_only=True)
    torch.save(content | {"optimizer_states": [{}]}, last)
    write(tmp_path, "weights", 60, 0)
    assert newest_checkpoint(tmp_path) == last
    last.unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "weights.ckpt"


def test_a_run_with_a_name_of_its_own_is_found(tmp_path: Path) -> None:
    logger = {"save_dir": str(tmp_path), "name": "r", "version": "mine"}
    last = write(tmp_path / "r" / "mine", "last", 40, 5, "2023-01-01T00:00:00+00:00")
    assert newest_of_all_runs(logger) == str(last)
    later = write(tmp_path / "r" / "version_0", "last", 10, 5, "2023-01-02T00:00:00+00:00")
    assert newest_of_all_runs(logger) == str(later)


def test_a_run_is_named_by_a_file_in_the_working_directory(tmp_path: Path) -> None:
    last = write(tmp_path / "run", "last", 40, 5)
    with chdir(last.parent):
        for value in ("last.ckpt", ".", "../config.yaml"):
            found = resumed_run(["fit", "--resume", value])[1]
            assert found is not None
            assert found.resolve() == tmp_path / "run"
