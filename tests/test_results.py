"""The command that trains tables of runs: what it trains, how it goes on, what it writes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.results.page import (
    all_records,
    render_headline,
    render_page,
    with_headline,
    write_pages,
)
from bench.results.queue import missing, train_all
from bench.results.records import Record, Records, Run
from bench.results.summary import Gain, Spread, summarize
from bench.results.table import Row, TableError, Tuning, option_list, read_table
from bench.results.train import Trainer
from gpd_cli.cli import run as run_command

ROOT = Path(__file__).parents[1]
TABLE: dict[str, Any] = {
    "title": "Digits",
    "about": "A small one.",
    "config": str(ROOT / "configs" / "digits.yaml"),
    "settings": {"model.branches": 1, "trainer.max_epochs": 3},
    "tuning": {"grid": [0.1, 0.2], "seed": 0, "settings": {"trainer.max_epochs": 1}},
    "seeds": [0, 1],
    "rows": {
        "alone": {"title": "alone", "settings": {"model.ratio": 1}},
        "gpd": {"title": "with GPD", "versus": "alone"},
        "longer": {
            "title": "trained further",
            "tuned_as": "alone",
            "files": {"model.student_weights": "alone"},
            "seeds": [1],
        },
    },
    "headline": ["alone", "gpd"],
    "reading": ["GPD gains {gpd.gain:+.1f} points in {gpd.time:.1f} times the time."],
}


def write_table(folder: Path, **changes: Any) -> Path:
    path = folder / "results" / "digits.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(TABLE | changes))
    return path


def records_in(folder: Path, **changes: Any) -> Records:
    path = write_table(folder, **changes)
    return Records(read_table(path), path.with_suffix(""))


def record(student: float, teacher: float | None = None, rate: float = 0.1) -> Record:
    """What a run of one epoch might leave; validation and test scores are the same."""
    scores = {"student_top1": student} | ({} if teacher is None else {"teacher_top1": teacher})
    epochs = {f"val/{name}": [value] for name, value in scores.items()}
    if teacher is not None:
        epochs["val/gap"] = [teacher - student]
    return {
        "command": "gpd fit",
        "learning_rate": rate,
        "seconds": 120.0 if teacher else 60.0,
        "epochs": epochs,
        "test": scores,
    }


def pretend(run: Run) -> Record:
    """A run for which the learning rate 0.2 is the better one, but not for the student alone."""
    assert run.rate is not None
    score = {"alone": -run.rate, "gpd": run.rate, "longer": 0.0}[run.row]
    return record(50 + 10 * score + run.seed, 60.0 if run.row == "gpd" else None, run.rate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "unexpected keyword argument 'seed'"),
        ({"headline": ["best"]}, "headline names the row 'best'"),
        ({"rows": {"a": {"title": "a", "versus": "b"}}, "headline": []}, "a.versus names the row"),
        ({"rows": {"a": {"titel": "a"}}, "headline": []}, "unexpected keyword argument 'titel'"),
        ({"reading": ["It is {best.gain}."]}, "reading names the row 'best'"),
        ({"seeds": []}, "alone has no learning rates or no seeds"),
        ({"rows": {"a": "b"}}, "has to be a mapping"),
    ],
)
def test_a_table_with_a_mistake_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TableError, match=message):
        read_table(write_table(tmp_path, **changes))


def test_a_missing_table_is_said_in_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.results", str(tmp_path / "none.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "none.yaml cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_settings_become_options_that_the_command_reads_back() -> None:
    settings = {"a.b": 2, "c": [0.1, 0.2], "d": {"e": True}, "f": None, "g": "name", "h": ["dbb"]}
    options = option_list(settings)
    found = {
        o.removeprefix("--").split("=")[0]: yaml.safe_load(o.split("=", 1)[1]) for o in options
    }
    assert found == settings


def test_learning_rates_are_chosen_for_each_row_and_then_every_seed_is_trained(
    tmp_path: Path,
) -> None:
    records = records_in(tmp_path)
    trained: list[Run] = []

    def train(run: Run) -> Record:
        trained.append(run)
        return pretend(run)

    assert train_all(records, train, jobs=1) == []
    rates = {(run.row, run.seed): run.rate for run in trained if not run.tuning}
    assert rates == {
        ("alone", 0): 0.1,
        ("alone", 1): 0.1,
        ("gpd", 0): 0.2,
        ("gpd", 1): 0.2,
        ("longer", 1): 0.1,  # as that of the row it is tuned as
    }
    assert sum(run.tuning for run in trained) == 4
    assert len(trained) == len(set(trained))
    assert list(missing(records)) == []


def test_only_what_is_missing_is_trained(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    train_all(records, pretend, jobs=2)
    (lost := Run("gpd", "1", 1).path(records.folder)).unlink()
    trained: list[Run] = []

    def train(run: Run) -> Record:
        trained.append(run)
        return pretend(run)

    train_all(records, train, jobs=2)
    assert [(run.row, run.name) for run in trained] == [("gpd", "1")]
    assert lost.is_file()


def test_rows_that_are_asked_for_come_with_what_they_need(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    trained: set[str] = set()

    def train(run: Run) -> Record:
        trained.add(run.row)
        return pretend(run)

    train_all(records, train, jobs=1, rows=["longer"])
    assert trained == {"alone", "longer"}


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    records = records_in(tmp_path)

    def train(run: Run) -> Record:
        if run.row == "alone" and run.name == "0":
            raise RuntimeError("the disk is full")
        return pretend(run)

    assert train_all(records, train, jobs=2) == ["alone/0: the disk is full"]
    assert len(records.finished(records.table.rows["gpd"])) == 2
    # What is trained further starts from this row, which is not complete.
    assert records.finished(records.table.rows["longer"]) == []


def test_told_to_end_it_ends_the_runs_that_are_under_way(tmp_path: Path) -> None:
    ended = threading.Event()

    def train(run: Run) -> Record:
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(20)
        raise RuntimeError("ended")

    with pytest.raises(KeyboardInterrupt):
        train_all(records_in(tmp_path), train, jobs=1, stop=ended.set)
    assert ended.is_set()


def test_means_spreads_and_gains_are_those_of_the_seeds(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    train_all(records, pretend, jobs=1)
    gpd = summarize(records)["gpd"]
    # alone: 49 and 50; with GPD 52 and 53; deviations sqrt(1/2) each
    assert gpd.student.values == (52, 53)
    assert gpd.gain is not None and gpd.gain.mean == pytest.approx(3.0)
    assert gpd.gain.error == pytest.approx((0.5 / 2 + 0.5 / 2) ** 0.5)
    assert gpd.gap is not None and gpd.gap.mean == pytest.approx(7.5)
    assert gpd.time == pytest.approx(2.0)
    assert str(gpd.student) == "52.50 ± 0.71" and f"{gpd.gain:+.1f}" == "+3.0"


def test_a_single_seed_has_no_spread() -> None:
    one, two = Spread((50.0,)), Spread((51.0, 53.0))
    assert one.deviation is None and str(one) == "50.00"
    assert Gain(two, one).error is None and str(Gain(two, one)) == "+2.00"


def test_the_page_and_the_readme_are_made_of_the_records(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "before\n<!-- results: python -m bench.results -->\nold\n<!-- end of results -->\nafter\n"
    )
    train_all(records, pretend, jobs=1, rows=["alone", "gpd"])
    write_pages(tmp_path)
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| with GPD | 52.50 ± 0.71 | alone | +3.00 ± 0.71 | 60.00 ± 0.00 | 7.50 ± 0.71 |" in page
    assert "Still to be trained: trained further." in page
    assert "| alone | **49.00** | 48.00 |" in page and "| with GPD | 51.00 | **52.00** |" in page
    assert "1. GPD gains +3.0 points in 2.0 times the time." in page
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| with GPD | 52.50 ± 0.71 | +3.00 ± 0.71 | 2 min |" in readme
    for name in ("accuracy", "gap", "time"):
        assert (tmp_path / "docs" / "results" / f"digits_{name}.png").stat().st_size > 1000


def test_the_committed_page_and_readme_say_what_the_committed_records_say() -> None:
    everything = all_records(ROOT)
    assert everything
    assert (ROOT / "docs" / "results.md").read_text() == render_page(everything)
    readme = (ROOT / "README.md").read_text()
    assert readme == with_headline(readme, render_headline(everything))
    for records in everything:
        if records.table.headline:
            assert records.table.title in readme


@pytest.mark.parametrize("records", all_records(ROOT), ids=lambda records: records.table.name)
def test_committed_records_are_of_the_rows_as_they_are_now(records: Records) -> None:
    table = records.table
    known = set()
    for row in table.rows.values():
        trainer = Trainer(table, Path("runs/results") / table.name, data_root="DATA")
        # The extracted student of another row lies in the folder that the records name.
        for run in (*records.tuning(row), *records.scored(row)):
            known.add(run.path(records.folder))
            found = records.read(run)
            if found is not None:
                options = [*trainer.options(row, run), "--data.root=DATA"]
                assert shlex.split(found["command"]) == ["gpd", "fit", *options]
    assert set(records.folder.glob("*/*.json")) <= known


@pytest.mark.parametrize("records", all_records(ROOT), ids=lambda records: records.table.name)
def test_every_row_of_the_tables_is_a_command_line_that_is_understood(
    records: Records, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    trainer = Trainer(records.table, Path("runs/results") / records.table.name)
    for row in records.table.rows.values():
        run = Run(row.key, "0", 0, records.table.grid_of(row)[0])
        assert run_command(["fit", *trainer.options(row, run), "--print_config"]) == 0
        assert "max_epochs" in capsys.readouterr().out


def test_a_tuning_run_takes_the_settings_of_tuning_last() -> None:
    row = Row("a", "a", {"trainer.max_epochs": 90})
    tuning = Tuning((0.1, 0.2), settings={"trainer.max_epochs": 10})
    table = read_table(ROOT / "results" / "cifar100_16px.yaml")
    table = type(table)(**{**vars(table), "rows": {"a": row}, "tuning": tuning})
    trainer = Trainer(table, Path("runs"))
    assert "--trainer.max_epochs=10" in trainer.options(row, Run("a", "lr-0.1", 0, 0.1, True))
    assert "--trainer.max_epochs=90" in trainer.options(row, Run("a", "0", 0, 0.1))


@pytest.mark.slow
def test_a_table_is_trained_through_the_command_and_goes_on_after_it_was_killed(
    tmp_path: Path,
) -> None:
    path = write_table(tmp_path, seeds=[1], tuning={"grid": [0.1]})
    command = [sys.executable, "-m", "bench.results", str(path), "--work", str(tmp_path / "work")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    (tmp_path / "docs").mkdir()
    first = tmp_path / "work" / "digits" / "alone" / "1" / "attempt_0"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not (first / "checkpoints" / "last.ckpt").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the run under way
        process.wait()
    assert not (path.with_suffix("") / "alone" / "1.json").exists()
    subprocess.run([*command, "--rows", "longer"], cwd=tmp_path, env=environment, check=True)
    resumed = json.loads((path.with_suffix("") / "alone" / "1.json").read_text())
    assert len(resumed["epochs"]["val/student_top1"]) == 3
    assert (first.parent / "attempt_1").is_dir()
    assert set(resumed["test"]) == {"student_top1"}
    further = json.loads((path.with_suffix("") / "longer" / "1.json").read_text())
    # It starts from the other row's student, and is ahead of that one's first epoch at once.
    assert further["epochs"]["val/student_top1"][0] > resumed["epochs"]["val/student_top1"][0] + 10
    assert set(further["test"]) == {"student_top1", "teacher_top1"}
    assert further["seconds"] > 0 and further["hardware"]["clock"] in ("processor", "wall")
    assert str(tmp_path) not in json.dumps({**further, "command": "", "config": ""})
