"""Help, what is said of options that there are not, and completion by the shell."""

import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpd_cli.__main__ import main
from gpd_cli.cli.stored_help import COMMANDS, PAGES, write_pages
from gpd_cli.cli.suggestions import nearest


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str, code: int = 0) -> str:
        got = main(list(arguments))
        output, error = capsys.readouterr()
        assert got == code, error
        return output + error

    return run


def test_our_options_come_first_and_the_trainers_on_request(say: Callable[..., str]) -> None:
    text = say("fit", "--help")
    ours = ["--model.student ", "--model.gap_weight", "--model.optimizer.lr", "--data.help"]
    places = [text.index(name) for name in [*ours, "--help-trainer"]]
    assert places == sorted(places)
    assert "--trainer.accelerator" not in text
    trainer = say("fit", "--help-trainer")
    assert "--trainer.accelerator" in trainer
    assert "--trainer.max_epochs" in trainer
    assert "--model.student" not in trainer


@pytest.mark.parametrize(
    ("group", "name"), [("model.static_teacher", "weights"), ("model.optimizer", "lr")]
)
def test_help_on_a_group_of_options(group: str, name: str, say: Callable[..., str]) -> None:
    text = say("fit", f"--{group}.help")
    assert f"--{group}.{name}" in text
    assert "--model.student" not in text and "--trainer" not in text


@pytest.mark.parametrize("command", ["fit", "test", "expand"])
def test_help_says_that_a_configuration_may_be_a_recipe(
    command: str, say: Callable[..., str]
) -> None:
    assert "recipe:NAME" in say(command, "--help")


def test_help_lists_every_setting_of_the_model(say: Callable[..., str]) -> None:
    import inspect

    from gpd_cli.training.module import GapPreservingDistillation

    text = say("fit", "--help")
    for name in inspect.signature(GapPreservingDistillation).parameters:
        assert f"--model.{name}" in text


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("fit", ("--ckpt_path", "--resume RUN", "--seed_everything")),
        ("validate", ("--ckpt_path", "--verbose")),
        ("test", ("--ckpt_path", "--verbose")),
        ("predict", ("--ckpt_path", "--images", "--output", "--top")),
    ],
)
def test_help_has_all_options_of_a_command(
    command: str, options: tuple[str, ...], say: Callable[..., str]
) -> None:
    text = say(command, "--help")
    for name in (*options, "--help-trainer", "--data.help"):
        assert name in text


def test_help_of_the_evaluations_is_our_own(say: Callable[..., str]) -> None:
    for command, images in (("validate", "validation images"), ("test", "test images")):
        text = " ".join(say(command, "--help").split())
        assert f"Score student and dynamic teacher on the {images}." in text
        assert '"registry"' not in text  # of Lightning's Trainer


@pytest.mark.parametrize("command", [[], ["recipes"], ["completion"]])
def test_pages_that_are_written_by_hand_fit_80_columns(
    command: list[str], say: Callable[..., str]
) -> None:
    lines = say(*command, "--help").splitlines()
    assert lines[0].startswith("usage: gpd")
    assert max(map(len, lines)) <= 80


def test_help_of_expand_shows_what_it_takes(say: Callable[..., str]) -> None:
    text = say("expand", "--help")
    for name in ("--model.student ", "--model.ratio", "--output", "--plan", "--dry_run"):
        assert name in text
    for name in ("--trainer", "--data", "--model.optimizer", "--model.gap_weight"):
        assert name not in text


def test_stored_pages_are_those_of_the_parsers(tmp_path: Path) -> None:
    def read(folder: Path) -> dict[str, str]:
        # Other tests have imported further classes, which jsonargparse names.
        pages = {path.stem: path.read_text() for path in folder.glob("*.txt")}
        return {name: re.sub(r", known subclasses: .*", "", text) for name, text in pages.items()}

    write_pages(tmp_path)
    assert read(tmp_path) == read(PAGES), "make help writes them anew"
    assert read(PAGES).keys() == set(COMMANDS)


@pytest.mark.parametrize("columns", [56, 80, 200])
@pytest.mark.parametrize("command", ["fit", "report"])
def test_stored_pages_are_wrapped_as_the_parsers_do(
    columns: int, command: str, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpd_cli.cli.command_line import run

    def shown(text: str) -> list[str]:
        """All lines but those that name subclasses, of which other tests have defined some."""
        text = re.sub(r"(?s)  --model\.method METHOD.*?(?=  --model\.stages)", "", text)
        return text.partition("  --data CONFIG")[0].splitlines()

    monkeypatch.setenv("COLUMNS", str(columns))
    stored = say(command, "--help")
    with contextlib.redirect_stdout(io.StringIO()) as live:
        assert run([command, "--help"]) == 0
    assert shown(stored) == shown(live.getvalue())


@pytest.mark.parametrize("arguments", [["fit", "--help"], ["extract", "-h"], ["--version"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    code = (
        "import sys; from gpd_cli.__main__ import main; main(sys.argv[1:]); "
        "print({name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout
    imported = ast.literal_eval(done.stderr)
    assert not imported & {"torch", "lightning", "timm", "jsonargparse", "numpy", "matplotlib"}


OPTIONS = [
    *("--model.ratio", "--model.optimizer.lr", "--model.optimizer.weight_decay", "--ckpt_path"),
    *("--trainer.max_epochs", "--data.batch_size", "--data.ratio", "--data.seed"),
    *("--model.optimizer", "--model.optimizer.opt", "--model.student_args"),
]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "--model.optimizer.lr"),
        ("--epochs", "--trainer.max_epochs"),
        ("--max-epochs", "--trainer.max_epochs"),
        ("--batch-size", "--data.batch_size"),
        ("--batch_size", "--data.batch_size"),
        ("--ratio", "--model.ratio"),
        ("--model.ratoi", "--model.ratio"),
        ("--model.optimizer.learning_rate", "--model.optimizer.lr"),
        ("--optimizer.lr", "--model.optimizer.lr"),
        ("--wieght-decay", "--model.optimizer.weight_decay"),
        ("--resume", "--ckpt_path"),
        ("--optimizer", "--model.optimizer.opt"),
        ("--pretrained", "--model.student_args '{pretrained: true}'"),
        ("--speed", None),
        ("--", None),
    ],
)
def test_nearest_option(typed: str, meant: str | None) -> None:
    assert nearest(typed, OPTIONS) == meant


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("fit --lr 0.1", "did you mean --model.optimizer.lr?"),
        ("fit --batch-size=64", "did you mean --data.batch_size?"),
        ("fit --model.student resnet18 --data.bathc_size 3", "did you mean batch_size?"),
        ("fit configs/digits.yaml", "given as -c configs/digits.yaml"),
        ("fit recipe:digits", "given as -c recipe:digits"),
        ("fit --resum runs", "did you mean --resume?"),
        ("fit --model resnet18", "did you mean --model.student resnet18?"),
        ("fit --data photos", "did you mean --data.root photos?"),
        ("fit --model.student resnet18 --model.optimizer lamb", "mean --model.optimizer.opt lamb?"),
        ("test best.ckpt", "given as --ckpt_path best.ckpt"),
        ("predict --images x.jpg", "add --ckpt_path FILE"),
        ("expand --model.student resnet18 --ouput x", "did you mean --output?"),
        ("extract --ckpt_path x --output y.pth --wich teacher", "did you mean --which?"),
        ("report x --spilt none", "did you mean --split?"),
    ],
)
def test_unknown_option_names_the_nearest(
    arguments: str, meant: str, say: Callable[..., str]
) -> None:
    error = say(*arguments.split(), code=2)
    assert meant in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completes_commands_and_options(
    shell: str, say: Callable[..., str], tmp_path: Path
) -> None:
    script = tmp_path / "gpd.sh"
    script.write_text(say("completion", shell))
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")

    def completed(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in words)
        arrays = "setopt ksh_arrays; autoload -U compinit; compinit -u; " if shell == "zsh" else ""
        line = f"{arrays}. ./gpd.sh; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _gpd; "
        done = subprocess.run(
            [shell, "-c", f'{line} printf "%s\\n" "${{COMPREPLY[@]}}"'],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        # zsh leaves it to its completion system to drop what does not fit.
        return [word for word in done.stdout.split() if word.startswith(words[-1])]

    assert set(completed("gpd", "ex")) == {"expand", "extract"}
    assert completed("gpd", "fit", "--model.rat") == ["--model.ratio"]
    assert completed("gpd", "fit", "--data.batch") == ["--data.batch_size"]
    assert completed("gpd", "expand", "--train") == []
    assert completed("gpd", "report", "--sp") == ["--split"]
    assert completed("gpd", "extract", "--which", "") == []  # files, by the shell itself
    assert completed("gpd", "fit", "--resu") == ["--resume"]
    assert completed("gpd", "test", "--help-") == ["--help-trainer"]
    assert completed("gpd", "compl") == ["completion"]
    assert set(completed("gpd", "completion", "")) == {"bash", "zsh"}
    assert completed("gpd", "recipes", "dig") == ["digits"]


def test_completion_for_another_shell_is_refused(say: Callable[..., str]) -> None:
    assert "choose bash or zsh" in say("completion", "fish", code=1)
    assert "gpd completion bash" in say("completion", code=1)
