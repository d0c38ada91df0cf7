"""The authors' code, timed from a checkout: here from a folder that has the same functions."""

import sys
from pathlib import Path

import pytest

from bench.fresh_process import in_fresh_process
from bench.speed.__main__ import main
from bench.speed.case import Case, cases
from bench.speed.reference import has_reference, measure_reference
from gpd_cli.errors import GpdError

SMALL = Case("cifar_resnet8", size=16, batch=2, branches=6)

FILES = {
    "orepa_ft.py": "def transfer2orepa(network, train_from_scratch):\n    return network\n",
    "models/__init__.py": "from .resnet import resnet18\n",
    "models/resnet.py": """
from torch import nn
def resnet18():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1000))
""",
    "gpd_utils.py": """
def gpd_init(network, first_module_name_list, last_module_name_list, test_input, gpd_ratio):
    assert gpd_ratio == 2
    return network
def forward_expanded(network, images):
    return network(images)
def enhance_with_es(network, images, wide, loss, compute, given, kd_loss_type, kd_loss_weight):
    loss.backward()
    return compute(network(images), *given), None, None
""",
}


def checkout(folder: Path, **changes: str) -> Path:
    for name, text in (FILES | changes).items():
        path = folder / "CNN" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.slow
def test_a_checkout_is_timed_against_the_floor(tmp_path: Path) -> None:
    figures = in_fresh_process(measure_reference, SMALL, "cpu", 1, checkout(tmp_path))
    assert figures["joint"] > 0
    assert 0 < figures["ratio"] < 1  # one layer


def test_a_folder_without_the_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--reference", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"Error: {tmp_path} is no checkout of github.com/guoyongcs/GPD")
    assert len(error.splitlines()) == 1


def test_code_that_does_not_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = checkout(tmp_path, **{"gpd_utils.py": "import a_module_that_is_not_there\n"})
    with pytest.raises(GpdError, match=r"does not run here: .*a_module_that_is_not_there"):
        measure_reference(SMALL, "cpu", 1, folder)


def test_reference_rows_are_those_of_resnet18_with_six_branches() -> None:
    rows = [case for case in cases("cpu") if has_reference(case)]
    assert {(case.student, case.branches, case.branch_width) for case in rows} == {
        ("resnet18", 6, 1.0)
    }
    assert len(rows) == 2
