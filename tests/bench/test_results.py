"""The command that trains tables of runs: what it trains, how it goes on, what it writes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench.results.__main__ import main as results_command
from bench.results.conclusions import Conclusion
from bench.results.figures import draw_figures
from bench.results.lock import only_one
from bench.results.page import all_records, render_page
from bench.results.queue import missing, train_all
from bench.results.readme import (
    FIGURE_MARKS,
    MARKS,
    made_pages,
    render_headline,
    write_pages,
)
from bench.results.records import STUDENT, Record, Records, Run
from bench.results.summary import (
    Spread,
    Summary,
    compared_by_epoch,
    compared_by_time,
    gain,
    summarize,
)
from bench.results.table import TableError, option_list, read_table
from bench.results.train import RunError, Trainer
from gpd_cli.cli.command_line import run as run_command
from gpd_cli.cli.failures import DIVERGED

ROOT = Path(__file__).parents[2]
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
    "reading": [
        {
            "gpd.gain.mean > 0": "It gains {gpd.gain.mean:+.1f} points in {gpd.time:.1f} x",
            "otherwise": "GPD gains nothing.",
        }
    ],
}


def write_table(folder: Path, **changes: Any) -> Path:
    path = folder / "results" / "digits.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(TABLE | changes))
    return path


def records_in(folder: Path, **changes: Any) -> Records:
    path = write_table(folder, **changes)
    return Records(read_table(path), path.with_suffix(""))


def pretend(records: Records) -> Callable[[Run], Record]:
    """Train nothing: the learning rate 0.2 is the better one, but not for the student alone."""

    def train(run: Run) -> Record:
        assert run.rate is not None
        sign = {"alone": -10, "gpd": 10, "longer": 0}[run.row]
        scores = {"student_top1": 50 + sign * run.rate + run.seed}
        if run.row == "gpd":
            scores |= {"teacher_top1": 60.0, "gap": 60 - scores["student_top1"]}
        return {
            "command": shlex.join(["gpd", "fit", *records.options(run), "--data.root=DATA"]),
            "learning_rate": run.rate,
            "seed": run.seed,
            "seconds": 120.0 if run.row == "gpd" else 60.0,
            "hardware": {"device": "A processor", "threads": 1},
            "epochs": {f"val/{name}": [value] for name, value in scores.items()},
            "test": scores,
        }

    return train


def play_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str = "") -> None:
    """Have a script that only prints a text and ends with a code take the place of every command.

    The working directory becomes the folder, in which the script lies.
    """
    monkeypatch.chdir(folder)
    script = folder / "python"
    script.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def pretended(folder: Path, rows: list[str] | None = None, **changes: Any) -> Records:
    """Records of a table that has been trained."""
    records = records_in(folder, **changes)
    assert train_all(records, pretend(records), jobs=1, rows=rows) == []
    return records


NO_TEXT: dict[str, Any] = {"headline": [], "reading": []}


def _reading(condition: str = "gpd.gap > 1", said: str = "", **more: str) -> dict[str, str]:
    return {condition: said, "otherwise": "", **more}


def _one_row(**entries: Any) -> dict[str, Any]:
    return {"rows": {"a": {"title": "a", **entries}}, **NO_TEXT}


def _tuned_as_another(**entries: Any) -> dict[str, Any]:
    rows = {"a": {"title": "a"}, "b": {"title": "b", "tuned_as": "a", **entries}}
    return {"rows": rows, **NO_TEXT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "unexpected keyword argument 'seed'"),
        ({"headline": ["best"]}, "headline names the row 'best'"),
        ({"rows": {"a": {"title": "a", "versus": "b"}}, "headline": []}, "a.versus names the row"),
        ({"rows": {"a": {"titel": "a"}}, "headline": []}, "unexpected keyword argument 'titel'"),
        ({"reading": ["It is ahead."]}, "a reading is a mapping of conditions to sentences"),
        ({"reading": [{"otherwise": "It is ahead."}]}, "needs a sentence under a condition"),
        ({"reading": [{"gpd.gap > 1": "It is ahead."}]}, "a last one under 'otherwise'"),
        ({"reading": [{"best.gap > 1": "a", "otherwise": "b"}]}, "reading names the row 'best'"),
        ({"reading": [{"gpd.gap": "a", "otherwise": "b"}]}, "the condition 'gpd.gap' is none"),
        ({"reading": [{"gpd.gap > 1": "{gpd.row}", "otherwise": ""}]}, "the number 'gpd.row'"),
        ({"reading": [{"gpd.time.low > 1": "a", "otherwise": ""}]}, "the number 'gpd.time.low'"),
        ({"metric": "training"}, "metric is 'training'; it is test or validation"),
        ({"seeds": []}, "alone has no learning rates or no seeds"),
        ({"rows": {"a": "b"}}, "has to be a mapping"),
        ({"tuning": {"grid": [0.1, "1e-3"]}}, "the learning rate '1e-3' of alone is no number"),
        ({"seeds": 0}, r"seeds is 0; it has to be a list"),
        ({"rows": {90: {"title": "a"}}}, "name of the row 90 is no text; put it in quotes"),
        (
            {"rows": {k: {"title": k, "files": {"f": of}} for k, of in ("ab", "ba")}, **NO_TEXT},
            "the rows ., . need the students of each other",
        ),
        (
            {"settings": {"trainer.check_val_every_n_epoch": 2}},
            "every epoch; remove trainer.check_val_every_n_epoch",
        ),
        (
            {"reading": [_reading(topic="T"), _reading(topic="T")]},
            "two readings have the topic",
        ),
        ({"reading": [_reading("alone.time > 1")]}, "compares the row 'alone', which has no"),
        ({"reading": [_reading(said="{gpd.gap:.1f}")]}, "such as gpd.gap.mean"),
        ({"reading": [_reading(said="{gpd.gap.mean:d}")]}, "cannot be printed: Unknown format"),
        ({"reading": [_reading(said="{gpd.gap.mean!q}")]}, "cannot be printed: Unknown conv"),
        ({"reading": [_reading(said="{}")]}, "cannot be printed"),
        ({"reading": [_reading() | {"topic": 3}]}, "the topic 3, which is no text"),
        ({"reading": 5}, "reading is 5; it has to be a list"),
        ({"rows": ["a"]}, r"rows is \['a'\]; it has to be a mapping"),
        ({"settings": ["x"]}, r"settings is \['x'\]; it has to be a mapping"),
        (_one_row(files=["x"]), r"the row 'a', files is \['x'\]; it has to be a mapping"),
        (_one_row(files={"x": ["b"]}), r"a.files names the row \['b'\], which is not there"),
        (_one_row(files={"x": None}), "a.files names the row None, which is not there"),
        (_one_row(settings="x"), "the row 'a', settings is 'x'; it has to be a mapping"),
        (_one_row(title=3), "the row 'a', title is 3; it has to be a text"),
        (_one_row(versus=["a"]), r"the row 'a', versus is \['a'\]; it has to be a text"),
        (_one_row(versus="a"), "a.versus names the row itself"),
        ({"headline": [["gpd"]]}, r"headline names the row \['gpd'\], which is not there"),
        ({"seeds": [0, 0, 1]}, "alone has the seed 0 several times"),
        ({"seeds": [0, "1"]}, "has the seed '1'; give a whole number"),
        ({"seeds": [-1]}, "has the seed -1; give a whole number"),
        ({"tuning": {"grid": [0.1], "seed": 0.5}}, "has the seed 0.5; give a whole number"),
        ({"tuning": {"grid": [-0.1]}}, "the learning rate -0.1 of alone is no number above 0"),
        ({"tuning": {"grid": [True]}}, "the learning rate True of alone is no number above 0"),
        ({"tuning": {"grid": [0.1, 0.1]}}, "alone has the learning rate 0.1 several times"),
        (_tuned_as_another(grid=[0.3]), "b takes its learning rate from 'a', and has a grid"),
        (_tuned_as_another(tuning={"x": 3}), "b takes its learning rate from 'a', and has a grid"),
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


def test_a_mistake_in_any_table_is_found_before_a_run_of_one_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.results.__main__.train_all", lambda *_, **__: pytest.fail())
    good, bad = write_table(tmp_path), tmp_path / "none.yaml"
    assert results_command([str(good), str(bad)]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
    bad.write_text(yaml.safe_dump(TABLE | {"rows": {"alone": {"title": "a"}}} | NO_TEXT))
    assert results_command([str(good), str(bad), "--rows", "gpd"]) == 2
    assert "none.yaml has no row gpd; it has alone" in capsys.readouterr().err


def test_the_pages_are_written_also_where_a_later_table_cannot_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written: list[Path] = []
    monkeypatch.setattr("bench.results.__main__.train_all", lambda *_, **__: [])
    monkeypatch.setattr("bench.results.__main__.write_pages", written.append)
    first = write_table(tmp_path)
    (second := tmp_path / "second.yaml").write_text(first.read_text())
    with only_one(read_table(second)):
        assert results_command([str(first), str(second)]) == 2
    assert "second is being trained by another command" in capsys.readouterr().err
    assert written == [Path()]


@pytest.mark.parametrize(
    ("content", "message"),
    [("<<<<<<< HEAD\n{}", "is no JSON"), ("[]", "has no command"), ("{}", "has no command")],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str, message: str) -> None:
    records = pretended(tmp_path)
    (records.folder / "alone" / "0.json").write_text(content)
    with pytest.raises(TableError, match=rf"alone/0\.json {message}"):
        render_page([records])


def test_no_run_at_a_time_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        results_command([str(write_table(tmp_path)), "--jobs", "0"])
    assert "--jobs is 0" in capsys.readouterr().err


def test_no_table_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        results_command(["--rows", "gpd", "results/digits.yaml"])  # all of these are rows
    assert "no TABLE is given (before --rows)" in capsys.readouterr().err


def test_an_entry_without_a_value_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    rows = {"alone": {"title": "alone", "settings": None, "seeds": None}}
    records = records_in(tmp_path, rows=rows, headline=None, reading=None)
    assert train_all(records, pretend(records), jobs=1) == []
    assert len(records.finished(records.table.rows["alone"])) == 2


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
        return pretend(records)(run)

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
    records = pretended(tmp_path)
    (lost := Run("gpd", "1", 1).path(records.folder)).unlink()
    trained: list[Run] = []

    def train(run: Run) -> Record:
        trained.append(run)
        return pretend(records)(run)

    train_all(records, train, jobs=2)
    assert [(run.row, run.name) for run in trained] == [("gpd", "1")]
    assert lost.is_file()


def test_rows_that_are_asked_for_come_with_what_they_need(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    trained: set[str] = set()

    def train(run: Run) -> Record:
        trained.add(run.row)
        return pretend(records)(run)

    train_all(records, train, jobs=1, rows=["longer"])
    assert trained == {"alone", "longer"}


def test_a_source_that_several_runs_start_from_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {name: dict(row) for name, row in TABLE["rows"].items()}
    rows["longer"]["seeds"] = [1, 2, 3]  # "alone" lacks 2 and 3, so these start from its seed 0
    records = records_in(tmp_path, rows=rows)
    making: list[Run] = []

    def train(run: Run) -> Record:
        for source in records.unmade_sources(run):
            making.append(source)
            time.sleep(0.2)
            (folder := records.work(source)).mkdir(parents=True)
            (folder / STUDENT).touch()
        return pretend(records)(run)

    assert train_all(records, train, jobs=3) == []
    assert sorted(source.seed for source in making) == [0, 1]
    assert len(records.finished(records.table.rows["longer"])) == 3


def chained(folder: Path) -> Records:
    """Trained rows of which one starts from another, and this one from a third."""
    rows = {name: dict(row) for name, row in TABLE["rows"].items()}
    rows["gpd"]["files"] = {"model.student_weights": "alone"}
    rows["longer"]["files"] = {"model.student_weights": "gpd"}
    records = records_in(folder, rows=rows)
    assert train_all(records, pretend(records), jobs=1) == []
    return records


def test_sources_of_sources_are_to_be_made_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records = chained(tmp_path)
    (longer,) = records.scored(records.table.rows["longer"])
    assert {run.row for run in records.unmade_sources(longer)} == {"gpd", "alone"}
    (source,) = (run for run in records.unmade_sources(longer) if run.row == "gpd")
    (folder := records.work(source)).mkdir(parents=True)
    (folder / STUDENT).touch()
    assert records.unmade_sources(longer) == set()


def test_a_run_waits_while_a_source_of_its_source_is_trained_for_its_own_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records = chained(tmp_path)
    for row in ("alone", "longer"):
        (records.folder / row / "1.json").unlink()
    under_way: list[Run] = []
    together: list[int] = []

    def train(run: Run) -> Record:
        under_way.append(run)
        time.sleep(0.1)
        together.append(len(under_way))
        under_way.remove(run)
        return pretend(records)(run)

    assert train_all(records, train, jobs=2) == []
    assert together == [1, 1]


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    records = records_in(tmp_path)

    def train(run: Run) -> Record:
        if run.row == "alone" and run.name == "0":
            raise RuntimeError("the disk is full")
        return pretend(records)(run)

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
    records = pretended(tmp_path)
    gpd = summarize(records)["gpd"]
    # alone: 49 and 50; with GPD 52 and 53, three points more for each seed
    assert gpd.student.values == (52, 53)
    assert gpd.gain is not None and gpd.gain.mean == pytest.approx(3.0)
    assert gpd.validation_gain is not None
    assert gpd.validation_gain.mean == pytest.approx(3.0)
    assert gpd.gap is not None and gpd.gap.mean == pytest.approx(7.5)
    assert gpd.time == pytest.approx(2.0)
    assert str(gpd.student) == "52.50 ± 0.71" and str(gpd.gain) == "+3.00 (2 seeds)"


def test_settings_are_compared_on_validation_images_at_the_students_best_epoch(
    tmp_path: Path,
) -> None:
    records = pretended(tmp_path, metric="validation")
    for path in records.folder.glob("gpd/?.json"):
        record = json.loads(path.read_text())
        del record["test"]  # such runs are not tested
        record["epochs"] = {"val/student_top1": [40, 55, 54], "val/teacher_top1": [41, 57, 70]}
        path.write_text(json.dumps(record))
    gpd = summarize(records)["gpd"]
    assert gpd.student.values == (55, 55) and gpd.gain == gpd.validation_gain
    assert gpd.teacher is not None and gpd.teacher.values == (57, 57)
    assert gpd.gap is not None and gpd.gap.values == (2, 2)
    page = render_page([records])
    assert "| row | student, validation | against | gain | teacher, validation | gap |" in page


def test_the_interval_of_a_gain_is_that_of_the_differences_over_common_seeds() -> None:
    # Differences 1, 3 and 5: deviation 2, and Student's t with two degrees of freedom is 4.303.
    paired = gain({0: 41.0, 1: 44.0, 2: 50.0}, {2: 45.0, 1: 41.0, 0: 40.0, 3: 90.0})
    assert paired is not None and paired.low is not None and paired.high is not None
    assert (paired.mean, paired.seeds) == (3.0, 3)
    assert paired.high - paired.mean == pytest.approx(4.303 * 2 / 3**0.5, abs=1e-3)
    assert paired.mean - paired.low == pytest.approx(paired.high - paired.mean)
    assert gain({2: 41.0}, {0: 40.0}) is None


def test_fewer_than_three_common_seeds_have_no_interval() -> None:
    assert str(gain({0: 51.0, 1: 53.0, 2: 60.0}, {0: 50.0})) == "+1.00 (1 seed)"
    assert str(gain({0: 51.0, 1: 53.0, 2: 60.0}, {0: 50.0, 1: 51.0})) == "+1.50 (2 seeds)"


def readings(records: Records) -> str:
    """The readings on the page of a table."""
    said = render_page([records]).partition("What this says:")[2].splitlines()
    return "\n".join(line for line in said if line[:1].isdigit())


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("gpd.gain.mean > 2.9", "1. 52.50 ± 0.71, +3.00 (2 seeds)"),
        ("gpd.gain > 2.9", "1. 52.50 ± 0.71, +3.00 (2 seeds)"),
        ("gpd.gain.mean > 2.9 and gpd.time <= 1.5", "1. no"),
        ("gpd.gain.mean < 2.9", "1. no"),
        ("gpd.gain.low > 0", ""),  # two seeds have no interval: neither sentence is true
        ("gpd.gain.low > 0 and gpd.time > 5", ""),
    ],
)
def test_a_reading_says_what_holds_and_nothing_where_a_number_is_unknown(
    tmp_path: Path, condition: str, said: str
) -> None:
    reading = {condition: "{gpd.student}, {gpd.gain}", "otherwise": "no"}
    assert readings(pretended(tmp_path, reading=[reading])) == said


def test_no_sentence_has_a_none_for_a_number(tmp_path: Path) -> None:
    reading = {"gpd.student > 0": "It gains at least {gpd.gain.low}.", "otherwise": ""}
    assert readings(pretended(tmp_path, reading=[reading])) == ""


def test_the_readme_says_when_to_use_the_method_and_what_is_not_measured(tmp_path: Path) -> None:
    topics = [
        {
            "topic": "epochs are fixed",
            "gpd.gain > 0": "use it ({gpd.gain}).",
            "otherwise": "do not.",
        },
        {"topic": "you go on", "longer.student > 0": "it helps.", "otherwise": "no."},
        {"topic": "you like waiting", "gpd.gain.low > 2": "wait.", "otherwise": "no."},
    ]
    headline = render_headline([pretended(tmp_path, rows=["alone", "gpd"], reading=topics)])
    assert "- **If epochs are fixed**: use it (+3.00 (2 seeds))." in headline
    assert "no advice is given if: you go on; you like waiting." in headline
    # A number that is not known is none that was measured: two seeds give no interval.
    headline = render_headline([pretended(tmp_path, reading=topics)])
    assert "- **If you go on**: it helps." in headline
    assert "no advice is given if: you like waiting." in headline


def test_figures_draw_what_can_be_compared(tmp_path: Path) -> None:
    records = pretended(tmp_path)
    table, found = records.table, summarize(records)

    def keys(rows: list[Summary]) -> list[str]:
        return [summary.row.key for summary in rows]

    assert keys(compared_by_epoch(table, found)) == keys(compared_by_time(table, found))
    assert keys(compared_by_time(table, found)) == ["alone", "gpd"]  # as in the headline
    draw_figures(records, found, tmp_path)
    for path in records.folder.glob("gpd/?.json"):
        record = json.loads(path.read_text()) | {"hardware": {"device": "Another", "threads": 1}}
        record["epochs"] = {name: [*curve, 60] for name, curve in record["epochs"].items()}
        path.write_text(json.dumps(record))
    found = summarize(records)
    assert keys(compared_by_epoch(table, found)) == ["alone"]  # the other one has more epochs
    assert compared_by_time(table, found) == []
    assert "digits_time.png" not in render_page([records])
    draw_figures(records, found, tmp_path)
    assert not (tmp_path / "digits_time.png").exists()  # that of earlier records


@pytest.mark.parametrize("row", ["gpd", "alone"])
def test_a_reading_waits_for_every_seed_of_its_rows_and_of_those_compared_with(
    tmp_path: Path, row: str
) -> None:
    reading = {"gpd.student > 0": "GPD reaches {gpd.student}.", "otherwise": ""}
    records = pretended(tmp_path, reading=[reading])
    assert readings(records) == "1. GPD reaches 52.50 ± 0.71."
    Run(row, "1", 1).path(records.folder).unlink()
    assert readings(records) == ""


def test_rows_are_ahead_or_behind_only_beyond_their_interval(tmp_path: Path) -> None:
    records = pretended(tmp_path, seeds=[0, 1, 2])

    def set_gpd(*students: float) -> str:
        for seed, student in enumerate(students):
            path = records.folder / "gpd" / f"{seed}.json"
            record = json.loads(path.read_text())
            record["test"]["student_top1"] = student
            path.write_text(json.dumps(record))
        return render_page([records])

    # The student alone: 49, 50, 51.
    assert "- Ahead of the row compared with (its whole interval is above 0): with GPD." in set_gpd(
        52.0, 53.1, 54.0
    )
    assert "- Behind the row compared with (its whole interval is below 0): with GPD." in set_gpd(
        46.0, 47.1, 48.0
    )
    assert (
        "- Not told apart from the row compared with (the interval holds 0): with GPD."
        in set_gpd(49.0, 51.0, 51.1)
    )
    (records.folder / "gpd" / "2.json").unlink()
    assert "so no verdict: with GPD." in render_page([records])


def test_a_run_whose_time_is_not_known_does_not_count_for_the_time(tmp_path: Path) -> None:
    records = pretended(tmp_path)
    for name in ("0", "1"):
        path = records.folder / "gpd" / f"{name}.json"
        path.write_text(path.read_text().replace('"seconds": 120.0', '"seconds": null'))
        found = summarize(records)["gpd"]
        minutes = None if found.minutes is None else found.minutes.values
        assert minutes == ((2.0,) if name == "0" else None)
    assert found.time is None and found.gain is not None
    page = render_page([records])
    assert "| with GPD | 52.50" in page
    assert "No time is known of: with GPD." in page


def test_times_of_different_hardware_are_not_compared(tmp_path: Path) -> None:
    records = pretended(tmp_path)

    def move(run: str, **hardware: Any) -> None:
        path = records.folder / f"{run}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": hardware}))

    move("gpd/0", device="A processor", threads=2)
    found = summarize(records)["gpd"]
    assert found.time == pytest.approx(2.0)  # by the other seed
    assert found.minutes is not None and found.minutes.values == (2.0,)
    move("gpd/1", device="Another", threads=1)
    assert summarize(records)["gpd"].time is None
    move("gpd/1", device="A processor", instructions="AVX2", threads=1)
    assert summarize(records)["gpd"].time is None
    page = render_page([records])
    assert (
        "over the runs of each row that were on hardware common to both, possibly one run" in page
    )
    assert (
        "A processor, 1 thread (alone; trained further), A processor, 2 threads (with GPD)" in page
    )


def test_a_row_that_is_changed_is_trained_again(tmp_path: Path) -> None:
    records = pretended(tmp_path)
    assert list(missing(records)) == []
    rows = {**TABLE["rows"], "gpd": {**TABLE["rows"]["gpd"], "settings": {"model.noise": 0.5}}}
    again = [(run.row, run.name) for run in missing(records_in(tmp_path, rows=rows))]
    assert again == [("gpd", "lr-0.1"), ("gpd", "lr-0.2")]
    # A better learning rate that joins the grid: the runs with the old one do not count any more.
    changed = records_in(tmp_path, tuning={**TABLE["tuning"], "grid": [0.1, 0.2, 0.01]})
    assert train_all(changed, pretend(changed), jobs=1) == []
    assert {r["learning_rate"] for r in changed.finished(changed.table.rows["alone"])} == {0.01}
    assert list(missing(changed)) == []


def test_rows_of_a_table_that_was_one_of_settings_are_tested_first(tmp_path: Path) -> None:
    records = pretended(tmp_path)
    for path in records.folder.glob("*/?.json"):
        record = json.loads(path.read_text())
        del record["test"]
        path.write_text(json.dumps(record))
    assert "Nothing has been trained yet." in render_page([records])
    assert {(run.row, run.tuning) for run in missing(records)} == {("alone", False), ("gpd", False)}
    assert list(missing(records_in(tmp_path, metric="validation"))) == []


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, Run, list[Path]]:
    """A run that was trained in three attempts, with what `gpd fit` has left of it."""
    monkeypatch.chdir(tmp_path)
    records = records_in(tmp_path, metric="validation")
    run = Run("alone", "0", 0, 0.1)
    folders = [records.work(run) / f"attempt_{number}" for number in range(3)]
    for number, folder in enumerate(folders):
        (folder / "checkpoints").mkdir(parents=True)
        epochs = {0: {"val/student_top1": 50.0}, 1: {"val/student_top1": 60.0}}
        content = {"callbacks": {"GapHistory": {"epochs": epochs}}}
        torch.save(content, folder / "checkpoints" / "last.ckpt")
        config = {name: {"accelerator": "cpu"} for name in ("model", "data", "trainer")}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "seconds.json").write_text(json.dumps({"processor": 10.0, "wall": 6.0}))
        git = {"commit": "abc"[number], "changed": [" M README.md", "M  results/src/0.json"]}
        start = {"processes": 2, "versions": {"torch": f"2.{number}"}, "git_of_gpd": git}
        (folder / "environment.json").write_text(json.dumps([start]))
    (records.work(run) / "finished").touch()
    return Trainer(records), run, folders


def test_a_record_tells_of_the_code_that_trained_not_of_the_one_that_makes_it(
    attempts: tuple[Trainer, Run, list[Path]],
) -> None:
    trainer, run, folders = attempts
    record = trainer.train(run)
    assert (record["commit"], record["versions"]) == ("a, b, c", {"torch": "2.2"})
    for folder in folders[1:]:
        shutil.copy(folders[0] / "environment.json", folder)
    assert trainer.train(run)["commit"] == "a"
    for folder in folders:
        (folder / "environment.json").unlink()
    assert trainer.train(run)["commit"] is None


def test_a_record_names_the_hardware_that_trained(
    attempts: tuple[Trainer, Run, list[Path]],
) -> None:
    trainer, run, folders = attempts
    machine = {"processor": "A processor", "instructions": "AVX2"}
    for folder in folders:
        (folder / "environment.json").write_text(json.dumps([{"machine": machine}]))
    record = trainer.train(run)
    assert record["hardware"] == {"device": "A processor", "instructions": "AVX2", "threads": 1}
    assert record["seconds"] == 30
    for change in ({"processor": "Another processor"}, {"instructions": "AVX512"}):
        (folders[1] / "environment.json").write_text(json.dumps([{"machine": machine | change}]))
        assert trainer.train(run)["seconds"] is None  # of two kinds


@pytest.mark.parametrize("line", [" M src/a.py", "?? src/b.py", 'R  configs/a.yaml -> "b c.yaml"'])
def test_a_record_says_that_its_code_was_not_committed(
    attempts: tuple[Trainer, Run, list[Path]], line: str
) -> None:
    trainer, run, folders = attempts
    git = {"commit": "c", "changed": [" M README.md", line]}
    (folders[2] / "environment.json").write_text(json.dumps([{"git_of_gpd": git}]))
    assert trainer.train(run)["commit"] == "a, b, c+"


def test_times_on_different_numbers_of_devices_are_not_compared(
    tmp_path: Path, attempts: tuple[Trainer, Run, list[Path]]
) -> None:
    trainer, run, _ = attempts
    hardware = trainer.train(run)["hardware"]
    assert hardware["processes"] == 2
    records = pretended(tmp_path)
    for seed in "01":
        path = records.folder / "gpd" / f"{seed}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": hardware}))
    found = summarize(records)["gpd"]
    assert found.time is None
    assert found.hardware is not None and found.hardware.endswith("1 thread, 2 processes")


def test_an_attempt_that_nothing_is_left_of_does_not_count_for_the_time(
    attempts: tuple[Trainer, Run, list[Path]],
) -> None:
    trainer, run, folders = attempts
    assert trainer.train(run)["seconds"] == 30
    # Killed before its first checkpoint: the next one began where this one had.
    (folders[1] / "checkpoints" / "last.ckpt").unlink()
    assert trainer.train(run)["seconds"] == 20
    (folders[1] / "seconds.json").unlink()
    assert trainer.train(run)["seconds"] == 20
    # Killed after its last checkpoint: the next one has done again what came in between.
    (folders[0] / "seconds.json").unlink()
    assert trainer.train(run)["seconds"] is None


@pytest.mark.parametrize(("code", "known"), [(0, True), (143, True), (1, False), (137, False)])
def test_the_time_of_a_command_that_may_have_lost_work_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, known: bool
) -> None:
    play_commands(tmp_path, monkeypatch, code)
    records = records_in(tmp_path, metric="validation")
    run = Run("alone", "0", 0, 0.1)
    with pytest.raises((RunError, OSError)):
        Trainer(records).train(run)
    assert (records.work(run) / "attempt_0" / "seconds.json").is_file() == known


def test_the_rate_that_was_chosen_is_marked_and_not_its_equals(tmp_path: Path) -> None:
    records = pretended(tmp_path)
    for path in records.folder.glob("gpd/lr-*.json"):
        record = json.loads(path.read_text())
        record["epochs"]["val/student_top1"] = [51.0]
        path.write_text(json.dumps(record))
    assert records.rate(records.table.rows["gpd"]) == 0.1
    assert "| with GPD | **51.00** | 51.00 |" in render_page([records])


def test_a_rate_is_explained_by_the_options_that_its_tuning_runs_had(tmp_path: Path) -> None:
    tuning = {"model.noise": 0.5, "trainer.max_epochs": 2}
    rows = {"gpd": {"title": "with GPD", "tuning": tuning}, "alone": {"title": "a", "grid": [0.1]}}
    records = records_in(tmp_path, rows=rows, **NO_TEXT)
    assert train_all(records, pretend(records), jobs=1) == []
    page = render_page([records])
    assert "Learning rates (seed 0, trainer.max_epochs 1):" in page
    further = "with GPD (model.noise 0.5, trainer.max_epochs 2)."
    assert f"\n\nTuned with further options: {further}" in page
    assert "takes the rate of another one, which is named, or has only one rate to try." in page


def test_other_options_have_other_folders_for_checkpoints(tmp_path: Path) -> None:
    records = pretended(tmp_path)
    other = records_in(tmp_path, settings={**TABLE["settings"], "model.noise": 0.5})
    run = Run("alone", "0", 0, 0.1)
    assert records.work(run) != other.work(run)
    assert records.work(run) == records_in(tmp_path).work(run)
    assert not records.work(run).is_absolute()


def test_a_single_seed_has_no_spread() -> None:
    one = Spread((50.0,))
    assert one.deviation is None and str(one) == "50.00"


def test_the_page_and_the_readme_are_made_of_the_records(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for path, marks in (("README.md", [*MARKS, *FIGURE_MARKS]), ("docs/index.md", FIGURE_MARKS)):
        (tmp_path / path).write_text("\nold\n".join(["before", *marks, "after\n"]))
    pretended(tmp_path, rows=["alone", "gpd"])
    write_pages(tmp_path)
    page = (tmp_path / "docs" / "results.md").read_text()
    gains = "+3.00 (2 seeds) | +3.00 (2 seeds)"
    assert f"| with GPD | 52.50 ± 0.71 | alone | {gains} | 60.00 ± 0.00 | 7.50 ± 0.71 |" in page
    assert "Still to be trained: trained further." in page
    assert "| alone | **49.00** | 48.00 |" in page and "| with GPD | 51.00 | **52.00** |" in page
    assert "1. It gains +3.0 points in 2.0 x" in page
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n")
    assert readme.count("old") == 3  # outside the marks
    assert "| with GPD | 52.50 ± 0.71 | alone | +3.00 (2 seeds) | 2.0 (2.0 x) | 2 |" in readme
    text = "and the gap, over epochs: alone; with GPD"
    for start, path in (("docs/", "README.md"), ("", "docs/index.md")):
        content = (tmp_path / path).read_text()
        assert f'src="{start}results/digits_gap.png"' in content and f'{text}">' in content
    for name in ("accuracy", "gap", "time"):
        assert (tmp_path / "docs" / "results" / f"digits_{name}.png").stat().st_size > 1000


def test_the_committed_page_and_readme_say_what_the_committed_records_say() -> None:
    for path, text in made_pages(ROOT).items():
        assert path.read_text() == text
    readme = (ROOT / "README.md").read_text()
    for records in all_records(ROOT):
        if any(key in summarize(records) for key in records.table.headline):
            assert records.table.title in readme


@pytest.mark.parametrize("records", all_records(ROOT), ids=lambda records: records.table.name)
def test_committed_records_are_of_the_rows_as_they_are_now(records: Records) -> None:
    runs = [
        run
        for row in records.table.rows.values()
        for run in (*records.tuning(row), *records.scored(row))
    ]
    paths = {run.path(records.folder): run for run in runs}
    for path in records.folder.glob("*/*.json"):
        assert records.read(paths[path]) is not None, path


@pytest.mark.parametrize("records", all_records(ROOT), ids=lambda records: records.table.name)
def test_every_row_of_the_tables_is_a_command_line_that_is_understood(
    records: Records, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a row has a record, that is one of the settings that its command line has today.

    Another value in the configuration that the table builds on, or another default, would leave the
    command line as it was.
    """
    monkeypatch.chdir(ROOT)
    for row in records.table.rows.values():
        run = Run(row.key, "0", 0, records.table.grid_of(row)[0])
        run = run if records.rate(row) is None else records.scored(row)[0]
        assert run_command(["fit", *records.options(run), "--print_config"]) == 0
        now = yaml.safe_load(capsys.readouterr().out)
        assert now["trainer"]["max_epochs"]
        if (record := records.read(run)) is not None:
            then = record["config"]
            then["data"]["init_args"].pop("root")
            for group in ("model", "data"):
                assert changed_settings(then[group], now[group]) == [], row.key


def changed_settings(then: Any, now: Any, name: str = "") -> list[str]:
    """The settings that differ between two configurations, of those that both have."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            found
            for key in then
            if key in now
            for found in changed_settings(then[key], now[key], f"{name}.{key}")
        ]
    return [] if then == now else [f"{name}: {then} and now {now}"]


def test_a_learning_rate_that_diverges_is_recorded_and_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_commands(tmp_path, monkeypatch, DIVERGED, "gpd: error: Training diverged.")
    records = records_in(tmp_path, tuning={**TABLE["tuning"], "grid": [0.1, 0.2, 0.4]})
    trainer = Trainer(records)

    def train(run: Run) -> Record:
        if run.rate != 0.4:
            return pretend(records)(run)
        attempt = records.work(run) / "attempt_1"  # the number that the next attempt has
        attempt.mkdir(parents=True)
        config = {name: {"accelerator": "cpu"} for name in ("model", "data", "trainer")}
        (attempt / "config.yaml").write_text(yaml.safe_dump(config))
        return trainer.train(run)

    assert train_all(records, train, jobs=1) == []
    assert records.rate(records.table.rows["gpd"]) == 0.2
    page = render_page([records])
    assert "| with GPD | 51.00 | **52.00** | diverged |" in page
    assert "edge of the grid, so that a better rate may lie beyond: alone." in page
    with pytest.raises(RunError, match="Training diverged"):  # but a scored run must not diverge
        train(Run("gpd", "0", 0, 0.4))


def test_where_every_learning_rate_diverges_no_seed_is_trained_and_the_row_is_named(
    tmp_path: Path,
) -> None:
    records = records_in(tmp_path)

    def train(run: Run) -> Record:
        assert run.row != "gpd" or run.tuning
        found = pretend(records)(run)
        return found | {"diverged": True} if run.row == "gpd" else found

    (sentence,) = train_all(records, train, jobs=1)
    assert sentence.startswith("gpd: training diverged at every learning rate of its grid")
    assert "| with GPD | diverged | diverged |" in render_page([records])


def test_a_page_without_headline_rows_links_no_picture_of_them(tmp_path: Path) -> None:
    records = pretended(tmp_path, rows=["gpd"], headline=["longer"])
    page = render_page([records])
    draw_figures(records, summarize(records), tmp_path)
    assert "digits_gap.png" not in page and not (tmp_path / "digits_gap.png").exists()


def test_a_best_learning_rate_at_the_edge_of_its_grid_is_pointed_out(tmp_path: Path) -> None:
    records = pretended(tmp_path, tuning={**TABLE["tuning"], "grid": [0.1, 0.2, 0.3]})
    edge = "Best at the edge of the grid, so that a better rate may lie beyond:"
    assert f"{edge} alone; with GPD." in render_page([records])
    path = Run("gpd", "lr-0.2", 0, 0.2, tuning=True).path(records.folder)
    record = json.loads(path.read_text())
    record["epochs"]["val/student_top1"] = [90]
    path.write_text(json.dumps(record))
    assert f"{edge} alone." in render_page([records])


@pytest.mark.parametrize("records", all_records(ROOT), ids=lambda records: records.table.name)
def test_every_sentence_of_the_tables_can_be_printed(records: Records, tmp_path: Path) -> None:
    summary = summarize(pretended(tmp_path, seeds=[0, 1, 2]))["gpd"]  # all numbers are known
    for conclusion in records.table.conclusions:
        for sentence in conclusion.sentences.values():
            only = Conclusion({"row.epochs < 0": "", "otherwise": sentence})
            text = only.say({"row": summary} | dict.fromkeys(only.rows(), summary))
            assert text is not None and "{" not in text and "None" not in text


def test_a_tuning_run_takes_the_settings_of_tuning_last(tmp_path: Path) -> None:
    records = records_in(tmp_path)
    assert "--trainer.max_epochs=1" in records.options(Run("gpd", "lr-0.1", 0, 0.1, tuning=True))
    assert "--trainer.max_epochs=3" in records.options(Run("gpd", "0", 0, 0.1))
    rows = {"gpd": {"title": "a", "settings": {"model.noise": 2}, "tuning": {"model.noise": 1}}}
    records = records_in(tmp_path, rows=rows, headline=[], reading=[])
    assert "--model.noise=1" in records.options(Run("gpd", "lr-0.1", 0, 0.1, tuning=True))
    assert "--model.noise=2" in records.options(Run("gpd", "0", 0, 0.1))


def test_one_command_at_a_time_trains_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = records_in(tmp_path).table
    with only_one(table), pytest.raises(TableError, match="trained by another"), only_one(table):
        pass
    with only_one(table):
        pass


@pytest.mark.slow
def test_a_table_is_trained_through_the_command_and_goes_on_after_it_was_killed(
    tmp_path: Path,
) -> None:
    path = write_table(tmp_path, seeds=[1], tuning={"grid": [0.1]})
    command = [sys.executable, "-m", "bench.results", str(path)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/index.md"):
        (tmp_path / page).write_text("")
    records = Records(read_table(path), path.with_suffix(""))
    first = tmp_path / records.work(Run("alone", "1", 1, 0.1)) / "attempt_0"
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
    assert further["seconds"] > 0 and further["attempts"] == 1
    assert resumed["seconds"] is None and resumed["attempts"] == 2  # the killed one's time is lost
    assert str(tmp_path) not in json.dumps([resumed["command"], further["command"]])
