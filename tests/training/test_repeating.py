"""The same seed gives the same bits, and the folder of a run says how to repeat it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_exact_resume import FOLDER, assert_same, fit, killed, prepared, run_of

from bench.chaos.compare import rows
from gpd_cli.cli.environment import git_state
from processes import in_processes


def test_the_saved_configuration_repeats_the_run(tmp_path: Path) -> None:
    """With augmentation, mixing, dropped paths and an average, all drawn anew."""
    one, other = tmp_path / "one", tmp_path / "other"
    assert fit(one, *prepared(one)) == 0
    other.mkdir()
    (other / "run.yaml").write_text((run_of(one) / "config.yaml").read_text())
    assert fit(other, "-c", "run.yaml") == 0
    assert_same(run_of(one), run_of(other))


@pytest.mark.slow
def test_another_seed_is_another_run(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seed in ((one, "0"), (other, "1")):
        assert fit(folder, *prepared(folder), "--seed_everything", seed) == 0
    assert rows(run_of(one)) != rows(run_of(other))


@pytest.mark.slow
def test_two_processes_repeat_their_run_with_other_workers(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "gpd_cli", "fit"]
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, workers in ((one, "0"), (other, "2")):
        options = prepared(folder, FOLDER.replace("0.2}", "0.2, batch_size: 8}"))
        (result,) = in_processes(folder, [*command, *options, "--data.num_workers", workers])
        assert result.returncode == 0, result.stderr
    assert_same(run_of(one), run_of(other))


@pytest.mark.slow
def test_each_start_leaves_what_is_needed_to_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = prepared(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=N", "-c", "user.email=n@example.org"]
    odd = os.fsdecode(b"caf\xe9.txt")  # names are bytes
    (tmp_path / odd).write_text("")
    for command in (
        ["init", "-q", "-b", "trunk"],
        ["config", "core.quotePath", "false"],
        ["add", "."],
        ["commit", "-q", "-m", "first"],
    ):
        subprocess.run([*git, *command], check=True)
    (tmp_path / odd).write_text("changed")
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text() + "# changed\n")
    killed(tmp_path, monkeypatch, [*options, "--trainer.save_every_n_steps", "1"], 3)
    assert fit(tmp_path, "--resume", "runs/run/version_0") == 0
    first, second = json.loads((run_of(tmp_path) / "environment.json").read_text())
    assert first["command"] == "gpd fit -c run.yaml --trainer.save_every_n_steps 1"
    assert second["command"] == "gpd fit --resume runs/run/version_0"
    assert (first["from_step"], second["from_step"]) == (0, 3)
    assert first["git"]["commit"] == commit.stdout.strip()
    assert first["git"]["branch"] == "trunk"
    assert first["git"]["changed"] == [r" M caf\xe9.txt", " M run.yaml"]
    assert first["folder"] == str(tmp_path)
    assert {"python", "torch", "lightning", "timm", "gpd-cli"} <= set(first["versions"])


def test_the_state_of_the_code_has_new_files_where_they_count(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=N", "-c", "user.email=n@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    assert git_state(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").write_text("")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    state = git_state(tmp_path / "src", untracked=True)
    assert state is not None and len(state["commit"]) == 40
    assert state["changed"] == []
    (tmp_path / "src" / "new.py").write_text("")
    assert git_state(tmp_path / "src") == state
    changed = git_state(tmp_path / "src", untracked=True)
    assert changed == state | {"changed": ["?? src/new.py"]}


@pytest.mark.parametrize("option", ["-c recipe:digits", "--config=recipe:digits"])
def test_a_recipe_is_noted_as_it_was_typed(option: str, tmp_path: Path) -> None:
    """By the path of its file the command would work with this installation alone."""
    short = ["--trainer.max_steps", "1", "--model.ratio", "1", "--model.branches", "1"]
    assert fit(tmp_path, *option.split(), *short) == 0
    (entry,) = json.loads((tmp_path / "runs/digits/version_0/environment.json").read_text())
    assert entry["command"] == f"gpd fit {option} {' '.join(short)}"
