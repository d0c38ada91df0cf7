"""What a person sees of a run: a row or line per epoch, the time left, the next command."""

import re
import shlex
import signal
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpd_cli.__main__ import main
from gpd_cli.training.clock import RunClock, in_digits, share_done
from gpd_cli.training.epoch_lines import EpochLines
from gpd_cli.training.epoch_scores import EpochScores
from gpd_cli.training.history import GapHistory
from gpd_cli.training.metrics import RunningAccuracy
from gpd_cli.training.progress import GapProgressBar, header, row
from runs import ALONE, PAIRED, UNVALIDATED, fit, last_logged, run_folder

CLOCK = r"(\d+:)?\d+:\d\d"


def test_lines_have_the_time_of_day_and_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, *ALONE, epochs=2) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " took " in line]
    assert len(lines) == 2
    for number, line in enumerate(lines, start=1):
        assert re.match(rf"\d\d:\d\d:\d\d epoch {number}/2  train: student .*  val: student ", line)
        assert re.search(rf"  took {CLOCK}, {CLOCK} left$", line)
    assert lines[-1].endswith(", 0:00 left")


def test_rows_stay_above_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert fit(tmp_path, *PAIRED, epochs=2) == 0
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", output)]
    (titles,) = [line for line in lines if "(validation, %)" in line and " time " in line]
    assert titles.split()[:5] == ["epoch", "time", "student", "teacher", "gap"]
    rows = [line.split() for line in lines if re.match(r" +\d/2 ", line)]
    assert [cells[0] for cells in rows] == ["1/2", "2/2"]
    assert rows[0][-1] == "best"  # the first one is, whatever it is
    assert float(rows[1][2]) == pytest.approx(last_logged(tmp_path, "val/student_top1"), abs=0.01)
    live = lines[: next(k for k, line in enumerate(lines) if line.startswith("best epoch"))]
    assert max(len(line) for line in live) <= 80


@pytest.mark.parametrize("display", [EpochScores, EpochLines, GapHistory, GapProgressBar])
def test_of_several_validations_of_an_epoch_the_best_is_shown(display: type[EpochScores]) -> None:
    """That is the one whose weights best.ckpt has; checkpoints between them have it, too."""
    module = LightningModule()
    trainer: Any = SimpleNamespace(sanity_checking=False, is_last_batch=True)
    shown = display()
    shown.on_train_epoch_start(trainer, module)
    for student, gap in [(70.0, 5.0), (40.0, 9.0), (70.0, 1.0)]:
        found = {"val/student_top1": student, "val/gap": gap, "val/raw_student_top1": student - 1}
        trainer.callback_metrics = {key: torch.tensor(v) for key, v in found.items()}
        trainer.callback_metrics["train/student_top1"] = torch.tensor(30.0)
        shown.on_validation_end(trainer, module)
        resumed = display()
        resumed.load_state_dict(shown.state_dict())
        shown = resumed
    assert shown.scores(trainer) == {
        "train": {"student_top1": 30},
        "val": {"student_top1": 70, "gap": 5},
    }
    assert shown.raw_scores(trainer) == {"student_top1": 69}
    shown.on_train_epoch_start(trainer, module)
    assert list(shown.scores(trainer)) == ["train"]


def test_a_row_with_everything_fits_eighty_columns() -> None:
    values = {"student_top1": 100.0, "teacher_top1": 99.5, "static_top1": 88.25, "gap": -0.5}
    full = row("1000/1000", 36_000, values, is_best=True)
    assert full.split() == ["1000/1000", "10:00:00", "100.00", "99.50", "88.25", "-0.50", "best"]
    assert max(len(full), len(f"{header(values)}  (validation, %)")) <= 80
    assert header(values).split() == ["epoch", "time", "student", "teacher", "static", "gap"]


def ended(scores: dict[str, float], best: float | None = None) -> Any:
    """A trainer at the end of the fourth of five epochs, with the score of its best.ckpt."""
    kept = SimpleNamespace(monitor="val/student_top1", best_model_score=best)
    return SimpleNamespace(
        **{"checkpoint_callbacks": [kept], "callbacks": [], "sanity_checking": False},
        **{"current_epoch": 3, "max_epochs": 5, "max_steps": -1, "global_step": 12},
        **{"is_last_batch": True, "num_training_batches": 3, "is_global_zero": True},
        fit_loop=SimpleNamespace(restarted_mid_epoch=False),
        callback_metrics={name: torch.tensor(score) for name, score in scores.items()},
    )


def printed(
    display: EpochScores, trainer: Any, capsys: pytest.CaptureFixture[str], validated: bool = True
) -> list[str]:
    """The lines that a display prints of such an epoch."""
    module = LightningModule()
    display.on_train_start(trainer, module)
    display.on_train_epoch_start(trainer, module)
    if validated:
        display.on_validation_end(trainer, module)
    display.on_train_epoch_end(trainer, module)
    display.on_train_end(trainer, module)
    return capsys.readouterr().out.splitlines()


def test_a_row_has_the_static_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"val/student_top1": 50.0, "val/static_top1": 80.0}
    lines = printed(GapProgressBar(), ended(scores), capsys)
    assert any(re.search(r" 4/5 .* 50\.00 +80\.00", line) for line in lines)


def test_rows_of_a_run_without_validation_have_training_accuracies(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = ended({"train/student_top1": 50.0})
    lines = printed(GapProgressBar(), trainer, capsys, validated=False)
    assert any("(training, %)" in line for line in lines)
    assert any(re.search(r" 4/5 .* 50\.00", line) for line in lines)


@pytest.mark.parametrize(("student", "is_best"), [(50.0, False), (70.0, True)])
def test_a_resumed_run_has_the_score_of_before_to_beat(
    capsys: pytest.CaptureFixture[str], student: float, is_best: bool
) -> None:
    lines = printed(GapProgressBar(), ended({"val/student_top1": student}, best=60.0), capsys)
    (printed_row,) = [line for line in lines if " 4/5 " in line]
    assert printed_row.rstrip().endswith("best") == is_best


def test_a_line_has_the_trained_weights_beside_their_average(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = {"val/student_top1": 50.0, "val/raw_student_top1": 40.0}
    (line,) = printed(EpochLines(), ended(scores), capsys)
    assert "val: student 50.00  raw: student 40.00  took" in line


def test_the_running_gap_is_the_lead_of_the_teacher() -> None:
    live, labels = RunningAccuracy(), torch.tensor([0, 1])
    right, half = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    live.update({"student": half, "teacher": right}, labels)
    assert {name: float(value) for name, value in live.shown().items()} == pytest.approx(
        {"student": 50, "teacher": 100, "gap": 50}
    )


@pytest.mark.parametrize(
    ("state", "share"),
    [
        ((5, 10, 50, -1), 0.5),
        ((0.25, 1, 3, -1), 0.25),
        ((5, -1, 50, 100), 0.5),
        ((5, 10, 90, 100), 0.9),  # whatever ends the run first
        ((5, -1, 50, -1), None),
        ((11, 10, 50, -1), 1.0),
    ],
)
def test_share_of_a_run_that_is_done(state: tuple[Any, ...], share: float | None) -> None:
    assert share_done(*state) == share


def test_the_time_left_is_by_the_pace_since_a_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of five epochs is resumed after three, and the fourth takes a minute."""
    now = [100.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("gpd_cli.training.clock.time", clock)
    run, trainer = RunClock(), ended({})
    run.start(trainer)
    assert run.left(trainer, within=0.0) is None
    now[0] += 60
    assert run.left(trainer, within=1.0) == pytest.approx(60)
    assert run.left(trainer, within=0.5) == pytest.approx(180)


def test_durations() -> None:
    assert [in_digits(s) for s in (0, 59.6, 754, 3725)] == ["0:00", "1:00", "12:34", "1:02:05"]


# The end


def commands(text: str) -> list[list[str]]:
    """The commands that a text tells one to type."""
    return [shlex.split(found) for found in re.findall(r"gpd ((?:test|extract|fit) .*)", text)]


def test_summary_has_the_best_epoch_and_commands_that_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, *PAIRED) == 0
    output = capsys.readouterr().out
    student, gap = (last_logged(tmp_path, f"val/{n}") for n in ("student_top1", "gap"))
    assert re.search(rf"best epoch +1 of 1: student {student:.2f}, teacher .*gap {gap:.2f}", output)
    for name in ("best.ckpt", "last.ckpt", "metrics.csv", "config.yaml", "gap.png"):
        assert name in output
    todo = commands(output)
    assert [command[0] for command in todo] == ["test", "extract"]
    with chdir(tmp_path):
        for command in todo:
            assert main(command) == 0
    assert (run_folder(tmp_path) / "student.safetensors").is_file()


def test_summary_of_a_run_without_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, *ALONE, *UNVALIDATED) == 0
    output = capsys.readouterr().out
    assert re.search(r"last epoch +1: student \d+\.\d\d \(training", output)
    todo = commands(output)
    assert [command[0] for command in todo] == ["test", "extract"]
    assert all("last.ckpt" in " ".join(command) for command in todo)


class CtrlC(Callback):
    """Stands for a person who has seen enough."""

    epoch = 1

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


class CtrlCAtOnce(CtrlC):
    epoch = 0


@pytest.fixture
def interrupted() -> Callable[..., int]:
    def run(folder: Path, callback: str, *options: str, epochs: int = 2) -> int:
        handler = signal.getsignal(signal.SIGINT)
        try:
            callbacks = f"--trainer.callbacks+=test_display.{callback}"
            return fit(folder, *ALONE, callbacks, *options, epochs=epochs)
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on

    return run


def test_interrupted_run_leaves_its_picture_and_the_command_that_resumes_it(
    tmp_path: Path, interrupted: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert interrupted(tmp_path, "CtrlC") == 130
    assert (run_folder(tmp_path) / "gap.png").read_bytes().startswith(b"\x89PNG")
    (command,) = commands(capfd.readouterr().err)
    config = run_folder(tmp_path) / "config.yaml"
    config.write_text(config.read_text().replace("test_display.CtrlC", "test_display.Nothing"))
    with chdir(tmp_path):
        assert main(command) == 0
    assert last_logged(tmp_path, "epoch") == 1


class Nothing(Callback):
    pass


def test_run_that_is_interrupted_at_once_has_nothing_to_go_on_from(
    tmp_path: Path, interrupted: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert interrupted(tmp_path, "CtrlCAtOnce") == 130
    assert "nothing to go on from" in capfd.readouterr().err


def test_resumed_run_that_is_interrupted_at_once_goes_on_from_where_it_did(
    tmp_path: Path, interrupted: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, *ALONE) == 0
    last = str(run_folder(tmp_path) / "checkpoints/last.ckpt")
    capfd.readouterr()
    assert interrupted(tmp_path, "CtrlC", "--ckpt_path", last) == 130
    (command,) = commands(capfd.readouterr().err)
    assert (tmp_path / command[-1]).resolve() == Path(last).resolve()
