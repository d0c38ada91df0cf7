"""Settings of methods: what they are checked for before anything is trained."""

import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from gpd_cli.__main__ import main
from gpd_cli.distill.features import Outputs
from gpd_cli.distill.methods import DKD, KD, METHODS, Batch, Method
from gpd_cli.distill.methods.dkd import dkd_loss
from gpd_cli.distill.methods.kd import kd_loss
from gpd_cli.errors import MethodError

NEEDED = {"crd": {"num_images": 8}}
HERE = "test_method_settings"


class Plain(Method):
    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return network.logits.sum()


class Typed(Plain):
    def __init__(self, scale: float = 1.0, sizes: list[int] | None = None) -> None:
        super().__init__()
        self.scale, self.sizes = scale, sizes


@pytest.fixture
def method(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The method of a command line, as it is parsed; or the sentence that refuses it."""

    def parsed(*options: str) -> Any:
        output = StringIO()
        with redirect_stdout(output):
            code = main(["fit", "--model.student", "resnet18", *options, "--print_config"])
        if code == 0:
            found = yaml.safe_load(output.getvalue())["model"]["method"]
            return found["class_path"], found.get("init_args", {})
        (said,) = capsys.readouterr().err.splitlines()
        return said

    return parsed


def test_numbers_written_as_text_are_numbers(method: Callable[..., Any]) -> None:
    options = ["--model.method", "PKT", "--model.method.weight", "3e4"]
    assert method(*options) == ("gpd_cli.distill.methods.PKT", {"weight": 30000.0})
    options = ["--model.method=DKD", "--model.method.alpha=1", "--model.method.standardize=true"]
    _, settings = method(*options)
    assert settings == {"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "standardize": True}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["DKD", "--model.method.alpha", "much"], r"method\.alpha takes a number, not much; see"),
        (
            ["DKD", "--model.method.beta", "much"],
            r"method\.beta takes a number or a mapping, .* not much; see",
        ),
        (
            ["KD", "--model.method.standardize", "maybe"],
            r"method\.standardize takes true or false, not maybe; see",
        ),
        (
            ["ReviewKD", "--model.method.width", "256.5"],
            r"method\.width takes a whole number or null, not 256\.5; see",
        ),
        (
            ["MLLD", "--model.method.temperatures", "4.0"],
            r"method\.temperatures takes a list.*, not 4\.0; see",
        ),
        (["KD", "--model.method.tau", "2"], r"KD: Option 'tau' is not accepted; .*method.help KD"),
        (
            [f"{HERE}.Typed", "--model.method.scale", "[1]"],
            r"method\.scale takes a number, not \[1\]; see",
        ),
        ([f"{HERE}.Plain", "--model.method.scale", "1"], rf"'scale' .*--model.method.help {HERE}"),
        ([f"{HERE}.Missing"], "Missing"),
        (["no_such_module.Method"], "No module named 'no_such_module'"),
        (["torch.nn.Linear"], "to be a subclass of Method"),
        (["crdd"], "'crdd'; choose one of AT, CATKD"),
    ],
)
def test_settings_that_a_class_does_not_take_are_refused(
    options: list[str], said: str, method: Callable[..., Any]
) -> None:
    found = method("--model.method", *options)
    assert isinstance(found, str) and re.search(said, found), found
    assert len(found) < 350, found


def test_methods_of_ones_own(method: Callable[..., Any]) -> None:
    options = ["--model.method.scale", "2", "--model.method.sizes", "[3, '4']"]
    found = method("--model.method", f"{HERE}.Typed", *options)
    assert found == (f"{HERE}.Typed", {"scale": 2.0, "sizes": [3, 4]})
    assert method("--model.method", f"{HERE}.Plain")[0] == f"{HERE}.Plain"


def test_help_of_a_method_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("DKD", "dkd"):
        assert main(["fit", "--model.method.help", name]) == 0
        shown = capsys.readouterr().out
        assert "--model.method.beta" in shown and "non-target term" in shown


def test_a_table_that_was_not_resolved_is_refused() -> None:
    with pytest.raises(MethodError, match="TEACHER -> STUDENT"):
        DKD(beta={"a": 2.0})


WEIGHTS = {
    "at": ["weight"],
    "catkd": ["weight"],
    "cc": ["weight"],
    "crd": ["weight"],
    "dist": ["beta", "gamma"],
    "dkd": ["alpha", "beta"],
    "fitnets": ["weight"],
    "mlld": ["instance_weight", "batch_weight", "class_weight"],
    "nkd": ["gamma"],
    "pkt": ["weight"],
    "reviewkd": ["weight"],
    "rkd": ["distance_weight", "angle_weight"],
    "simkd": ["weight"],
    "srrl": ["feature_weight", "softmax_weight"],
}


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_weights_and_temperatures_out_of_range_are_refused(cls: type[Method]) -> None:
    name = cls.__name__.lower()
    cls(**NEEDED.get(name, {}))
    for key in WEIGHTS.get(name, ()):
        with pytest.raises(MethodError, match="0 or more and finite, not -1"):
            cls(**{**NEEDED.get(name, {}), key: -1.0})


def test_losses_of_half_precision_are_computed_in_full() -> None:
    student, teacher = torch.randn(2, 4, 10).bfloat16()
    labels = torch.arange(4)
    for loss in (
        kd_loss(student, teacher, 2.0),
        dkd_loss(student, teacher, labels, 1.0, 2.0, 2.0),
        KD()(Outputs(student), Outputs(teacher), Batch(labels)),
    ):
        assert loss.dtype == torch.float32


def test_a_method_that_is_chosen_starts_from_its_own_defaults(
    method: Callable[..., Any], tmp_path: Path
) -> None:
    # KD, the default, has another temperature.
    assert method("--model.method", "DKD")[1]["temperature"] == 1.0
    (tmp_path / "nkd.yaml").write_text("model: {method: {class_path: gpd_cli.methods.NKD}}")
    assert method("-c", str(tmp_path / "nkd.yaml"))[1] == {"gamma": 1.5, "temperature": 1.0}
    assert method("--model.method.temperature", "2")[1] == {
        "temperature": 2.0,
        "standardize": False,
    }
    assert method() == ("gpd_cli.distill.methods.KD", {"temperature": 4.0, "standardize": False})
