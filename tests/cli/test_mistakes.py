"""Plausible mistakes: each is refused in one sentence that names the thing and the remedy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gpd_cli.__main__ import main

Refuse = Callable[..., str]
STUDENT = ["--model.student", "resnet18"]


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Run a command in a folder of its own, and return the one sentence that refuses it."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert main(list(arguments)) in (1, 2)
        said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("gpd: error: ")]
        assert len(said) == 1
        return said[0].removeprefix("gpd: error: ")

    return run


@pytest.mark.parametrize("command", ["fit", "expand"])
def test_no_student(command: str, refuse: Refuse) -> None:
    assert refuse(command) == (
        "--model.student is required; name a network, or start with -c recipe:digits (gpd recipes "
        "lists more)."
    )


def test_other_options_that_are_required(refuse: Refuse) -> None:
    assert refuse("extract") == "--ckpt_path and --output are required; see gpd extract --help."
    assert "folder of a run is required" in refuse("report")


def test_a_random_seed_that_is_none(refuse: Refuse) -> None:
    assert refuse("fit", "-c", "recipe:digits", "--seed_everything", "true") == (
        "--seed_everything true would set the seed 0 every time; give a number, or false; see "
        "gpd fit --help."
    )


# Configurations


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {ratoi: 2}", "there is no option model.ratoi (did you mean model.ratio?)."),
        ("model.ratoi: 2", "there is no option model.ratoi (did you mean model.ratio?)."),
        (
            "model: {optimizer: {lrr: 2}}",
            "there is no option model.optimizer.lrr (did you mean model.optimizer.lr?).",
        ),
        (
            "trainer: {max_epoch: 2}",
            "there is no option trainer.max_epoch (did you mean trainer.max_epochs?).",
        ),
        ("modle: {ratio: 2}", "there is no option modle.ratio (did you mean model.ratio?)."),
        ("speed: 2", "there is no option speed."),
        ("data: {batchsize: 2}", "--data gpd_cli.data.ImageData: Option 'batchsize'"),
        (
            "model: {method: {class_path: DKD, init_args: {tau: 2}}}",
            "--model.method gpd_cli.distill.methods.DKD: Option 'tau'",
        ),
    ],
)
def test_unknown_option_of_a_configuration(text: str, said: str, refuse: Refuse) -> None:
    Path("other.yaml").write_text("model: {ratio: 3}")
    Path("typo.yaml").write_text(text)
    assert refuse("fit", *STUDENT, "-c", "typo.yaml", "-c", "other.yaml").startswith(
        f"typo.yaml: {said}"
    )
    Path("builds.yaml").write_text("config: typo.yaml")
    assert refuse("fit", *STUDENT, "--config=builds.yaml").startswith(f"typo.yaml: {said}")


def test_a_configuration_of_another_command(refuse: Refuse) -> None:
    Path("fit.yaml").write_text("model: {student: resnet18}")
    arguments = ["--ckpt_path", "x", "--output", "y.pth", "-c", "fit.yaml"]
    assert refuse("extract", *arguments) == "fit.yaml: there is no option model.student."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  branches: [a, b\n  ratio: 2\n", ", line 3: expected ',' or ']'"),
        ("model:\n\tratio: 2\n", ", line 2: found character '\\t'"),
        ("data: {seed: 2}\nmodel: {*x : 2}\n", ", line 2: found undefined alias"),
        (
            "model: {ratio: 2}\ndata: {seed: 2}\nmodel: {branches: 1}\n",
            "the entry 'model' is written a second time in line 3",
        ),
        ("model: \0", ": special characters are not allowed."),
        ("", " is empty;"),
        ("# nothing yet\n", " is empty;"),
        ("- a\n", " contains no options"),
        ("resnet18", " contains no options"),
        ("config: bad.yaml", " builds on itself"),
        ("config: nothere.yaml", "no configuration 'nothere.yaml', on which bad.yaml builds"),
        ("config: recipe:digit", "Unknown recipe 'digit'"),
        (
            "config: 3\nmodel: {ratio: 2}",
            ": config takes the path or name of a configuration, not 3.",
        ),
        ("model: [1]", ": model takes options with values, not [1]."),
        ("model: {method: {class_path: Nope}}", "Unknown distillation method 'Nope'"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "extract"])
def test_a_configuration_that_cannot_be_read(
    command: str, text: str, said: str, refuse: Refuse
) -> None:
    Path("bad.yaml").write_text(text)
    sentence = refuse(command, "-c", "bad.yaml")
    assert (f"bad.yaml{said}" if said.startswith((",", ":", " ")) else said) in sentence
    assert "unicode string" not in sentence


def test_a_configuration_that_is_no_text(refuse: Refuse) -> None:
    Path("bad.yaml").write_bytes(b"\xff\xfe\x81")
    assert refuse("fit", "-c", "bad.yaml").startswith("bad.yaml is not text")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nofile.yaml", "; gpd recipes lists those of the package."),
        ("digits", " (did you mean recipe:digits?)."),
        ("configs/digits.yaml", " (did you mean recipe:digits?)."),
        ("photo.yaml", " (did you mean recipe:photos?)."),
        ("x" * 300, "; gpd recipes lists those of the package."),
    ],
)
def test_a_configuration_that_there_is_not(name: str, said: str, refuse: Refuse) -> None:
    assert refuse("fit", "-c", name) == f"There is no configuration '{name}'{said}"


def test_a_folder_with_the_name_of_a_recipe(refuse: Refuse) -> None:
    Path("digits").mkdir()
    said = "'digits' is a folder, not a configuration (did you mean recipe:digits?)."
    assert refuse("fit", "-c", "digits") == said


def test_groups_without_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they are left where all options of a group have been commented out."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model: {student: resnet18, ratio: 3}\ntrainer:\ndata:\n")
    assert main(["fit", "-c", "mine.yaml", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "ratio: 3" in printed and "max_epochs" in printed and "dataset: digits" in printed


def test_settings_in_the_place_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    inline = "{model: {student: resnet18, ratio: 3}}"
    assert main(["fit", "-c", inline, "--print_config"]) == 0
    assert "ratio: 3" in capsys.readouterr().out


# Options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "x", "--split", "tests"], "--split takes validation, test or none, not tests"),
        (["fit", *STUDENT, "--model.ratio", "wide"], "--model.ratio takes a number, not wide"),
        (["fit", *STUDENT, "--model.shared", "no?"], "--model.shared takes true or false, not no?"),
        (
            ["fit", *STUDENT, "--model.storage", "big"],
            "--model.storage takes mixed, student, teacher or null, not big",
        ),
        (["fit", *STUDENT, "--data.batch_size", "x"], "--data.batch_size takes a whole number"),
        (["fit", *STUDENT, "--data.cache", "x"], "--data.cache takes none, memory or device"),
        (["fit", *STUDENT, "--data.classes", "x"], "--data.classes takes a whole number or null"),
        (["fit", *STUDENT, "--data.mean", "x"], "--data.mean takes a list of numbers or null"),
        (
            ["fit", *STUDENT, "--model.student_args", "3"],
            "--model.student_args takes a mapping, such as '{name: value}' or null, not 3",
        ),
        (["predict", "--top", "x"], "--top takes a whole number, not x"),
        (["report", "x", "--split"], "--split needs a value"),
        (["fit", "-c"], "--config needs a value"),
    ],
)
def test_a_value_of_another_type(arguments: list[str], said: str, refuse: Refuse) -> None:
    sentence = refuse(*arguments)
    assert sentence.startswith(said)
    assert "Expected" not in sentence and "typing" not in sentence


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["fit", *STUDENT, "--trainer.max_epoch", "3"], "--trainer.max_epochs"),
        (["fit", "--model.stud", "resnet18"], "--model.student"),
        (["fit", *STUDENT, "--model.static_teacher.weight=x"], "--model.static_teacher.weights"),
        (["extract", "--ckpt", "x", "--output", "y.pth"], "--ckpt_path"),
    ],
)
def test_the_beginning_of_a_name_is_no_option(
    arguments: list[str], meant: str, refuse: Refuse
) -> None:
    assert f"did you mean {meant}?" in refuse(*arguments)
