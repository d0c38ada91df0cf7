import json
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench.speed.__main__ import main as bench_speed
from bench.speed.case import Case, cases
from bench.speed.forecast import PROCESSES
from bench.speed.machine import Machine
from bench.speed.measure import make_steps, measure, peak_of_step
from bench.speed.page import COMPUTED, PAGE, RECORDS, write_page
from bench.speed.whole import images_per_second
from documentation import ROOT
from gpd_cli.models import create_model

SMALL = Case("cifar_resnet8", size=16, batch=2, branches=6)


@pytest.mark.slow
def test_figures_of_a_small_case_are_a_page(tmp_path: Path) -> None:
    figures = measure(SMALL, "cpu", rounds=1)
    assert all(value > 0 for value in figures.values())
    assert figures["merging"] < 1
    for name in ("joint", "wide"):
        figures[f"{name}_memory"] = peak_of_step(SMALL, "cpu", name)
    figures["whole"] = images_per_second(SMALL, "cpu")
    assert figures["whole"] > 0
    record = {
        "machine": "a machine",
        "threads": 1,
        "rounds": 1,
        "versions": {"torch": "3"},
        "command": "python -m bench.speed",
        "rates": {"flops": 8e10, "low_flops": 1e11, "bandwidth": 1e10},
        "rows": [
            {
                "case": asdict(SMALL),
                "figures": figures,
                "predicted": {"ratio": 2.25},
                "reference": {"ratio": 7.5},
            }
        ],
    }
    (tmp_path / RECORDS).mkdir(parents=True)
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / RECORDS / "cpu.json").write_text(json.dumps(record))
    write_page(tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert f"| cifar_resnet8 | 16 | 2 | 6 | {figures['student']:.0f} ms |" in page
    assert f"| **{figures['ratio']:.2f}** | 2.25 | 7.50 |" in page
    assert "Many GPUs" not in page


@pytest.mark.slow
def test_the_command_measures_its_rows_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.speed.case.cases", lambda device: [SMALL])
    monkeypatch.setattr("sys.argv", ["bench.speed", "--rounds", "1"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / PAGE).parent.mkdir()
    # Other tests import what runs here as a program.
    monkeypatch.delitem(sys.modules, "bench.speed.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench.speed", run_name="__main__")
    assert ended.value.code == 0
    (row,) = json.loads((tmp_path / RECORDS / "cpu.json").read_text())["rows"]
    assert row["figures"]["ratio"] > 0
    assert row["predicted"]["ratio"] > 1
    assert "cifar_resnet8" in (tmp_path / PAGE).read_text()


PRETENDED: dict[str, Any] = {
    "attained": Machine(1e9, 2e9, 3e9),
    "measure": {"student": 1.0, "wide": 2.0, "joint": 4.0, "ratio": 1.3, "images": 5.0},
    "peak_of_step": 10.0,
    "images_per_second": 4.0,
    "predict_case": {"ratio": 1.2},
    "measure_reference": {"ratio": 1.9},
}
"""What the functions return that measure, by name."""


def test_rows_of_a_record_are_measured_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    PAGE.parent.mkdir()
    monkeypatch.setattr(
        "bench.speed.__main__.in_fresh_process", lambda function, *_: PRETENDED[function.__name__]
    )
    monkeypatch.setattr("bench.speed.__main__.find_code", lambda folder: folder)
    with_authors = ["--rounds", "2", "--reference", "folder"]
    assert bench_speed(with_authors) == 0
    record = (RECORDS / "cpu.json").read_text()
    assert bench_speed([*with_authors, "--only", "resnet18"]) == 0
    for others in (["--rounds", "2"], ["--rounds", "3", "--reference", "folder"]):
        assert bench_speed([*others, "--only", "resnet18"]) == 1
        said = capsys.readouterr().err
        assert "by `python -m bench.speed --device cpu --rounds 2 --reference GPD`" in said
    assert (RECORDS / "cpu.json").read_text() == record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "resnet18", "resnet81"], "'resnet81', which is no row of cpu; the students"),
        (["--rounds", "0"], "--rounds is 0; at least one turn has to count"),
    ],
)
def test_rows_and_turns_that_are_none_are_refused_before_measuring(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_speed(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_each_step_trains_its_network() -> None:
    steps = make_steps(SMALL, "cpu")
    assert list(steps) == ["student", "wide", "joint", "merging"]
    assert list(make_steps(SMALL, "cpu", ("joint",))) == ["joint"]


def test_the_computed_table_says_that_it_is(tmp_path: Path) -> None:
    figures = dict.fromkeys(("student", "wide", "merging", "ratio"), 2.0)
    for processes in PROCESSES:
        for name in ("merged", "each"):
            figures |= {f"{name}_{processes}": 3.0, f"{name}_ratio_{processes}": 1.25}
    record = {"command": "count", "rows": [{"case": asdict(SMALL), "figures": figures}]}
    (tmp_path / RECORDS).mkdir(parents=True)
    (tmp_path / PAGE).parent.mkdir()
    (tmp_path / COMPUTED).write_text(json.dumps(record))
    write_page(tmp_path)
    page = (tmp_path / PAGE).read_text()
    assert "computed, not measured" in page and "## Measured" not in page
    assert "| 3.0 ms | 3.0 ms | 1.25 | 1.25 |" in page


def test_the_page_is_that_of_the_records(tmp_path: Path) -> None:
    shutil.copytree(ROOT / RECORDS, tmp_path / RECORDS)
    (tmp_path / PAGE).parent.mkdir()
    write_page(tmp_path)
    assert (tmp_path / PAGE).read_text() == (ROOT / PAGE).read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_those_of_three_networks_that_can_be_built(device: str) -> None:
    students = {case.student for case in cases(device)}
    assert students == {"resnet18", "mobilenetv1_relu", "vit_tiny_patch16_224"}
    for student in students:
        create_model(student)
    assert {case.branches for case in cases(device) if case.student == "resnet18"} == {1, 6}
