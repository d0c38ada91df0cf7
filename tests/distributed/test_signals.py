"""Signals to a run: what is saved, what is said, and that what is said is right."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpd_cli.__main__ import main
from gpd_cli.distributed.interruptions import Interruptions
from processes import importable
from runs import ALONE, BATCHES, checkpoint, fit, run_folder


class Signals(Callback):
    """Sends signals to this process in the middle of steps, and one to a run that goes on none.

    Set by the tests: signals by the number of updates before them.
    """

    at: dict[int, list[int]] = {}  # noqa: RUF012 - replaced as a whole

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        for number in self.at.get(trainer.global_step, []):
            os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def heard_hangup() -> Iterator[None]:
    """Have SIGHUP heard, which `nohup make test` would have ignored by the tests and their runs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


HEARD = [*ALONE, "--trainer.callbacks+=test_signals.Signals"]


def told(capfd: pytest.CaptureFixture[str]) -> list[str]:
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    return [line for line in errors.splitlines() if line.startswith("gpd:")]


def handlers() -> list[Any]:
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    return [signal.getsignal(getattr(signal, name)) for name in names]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_names_the_command_that_goes_on(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    before = handlers()
    monkeypatch.setattr(Signals, "at", {BATCHES + 1: [number]})
    assert fit(tmp_path, *HEARD, epochs=2) == 128 + number
    assert handlers() == before
    assert checkpoint(tmp_path, "stopped")["global_step"] == BATCHES + 2
    last = told(capfd)[-1]
    assert last == (
        f"gpd: stopped at step {BATCHES + 2}; saved as "
        "runs/gpd/version_0/checkpoints/stopped.ckpt; go on with: gpd fit --resume "
        "runs/gpd/version_0"
    )
    monkeypatch.setattr(Signals, "at", {})
    _, *command = shlex.split(last.partition("go on with: ")[2])
    with chdir(tmp_path):
        assert main(command) == 0
    assert checkpoint(tmp_path)["global_step"] == 2 * BATCHES
    assert sorted(path.name for path in (tmp_path / "runs" / "gpd").iterdir()) == ["version_0"]


def test_usr1_saves_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            path = run_folder(tmp_path) / "checkpoints" / "last.ckpt"
            if path.is_file():
                saved.append(torch.load(path, weights_only=True)["global_step"])

    monkeypatch.setattr(sys.modules[__name__], "Seen", Seen, raising=False)
    monkeypatch.setattr(Signals, "at", {0: [signal.SIGUSR1]})
    assert fit(tmp_path, *HEARD, "--trainer.callbacks+=test_signals.Seen") == 0
    assert saved == [1, 1]
    (line,) = told(capfd)
    assert line.startswith("gpd: step 1: saved as ")
    assert line.endswith("runs/gpd/version_0/checkpoints/last.ckpt; going on")


@pytest.mark.parametrize("done", [0, BATCHES])
def test_ctrl_c_twice_stops_at_once_and_names_what_there_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    monkeypatch.setattr(Signals, "at", {done: [signal.SIGINT, signal.SIGINT]})
    monkeypatch.setattr("gpd_cli.distributed.interruptions._ONE_KEY", -1.0)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert fit(tmp_path, *HEARD, epochs=2) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on
    lines = told(capfd)
    assert "Ctrl-C again stops at once" in lines[0]
    assert lines[1].startswith(f"gpd: interrupted; stopped at step {done}; ")
    folder = run_folder(tmp_path) / "checkpoints"
    if done:
        assert lines[1].endswith(
            "last saved as runs/gpd/version_0/checkpoints/last.ckpt; go on with: gpd fit "
            "--resume runs/gpd/version_0"
        )
        assert checkpoint(tmp_path)["global_step"] == BATCHES
    else:
        assert lines[1].endswith("nothing has been saved, and there is nothing to go on from")
    assert not (folder / "stopped.ckpt").exists()


class Told(Callback):
    """Sends a signal to this process during the first batch of an evaluation."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_test_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), self.number)

    on_predict_batch_start = on_test_batch_start


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    folder = tmp_path_factory.mktemp("trained")
    assert fit(folder, *ALONE) == 0
    return run_folder(folder) / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGTERM, "gpd: stopped"), (signal.SIGINT, "gpd: interrupted")],
)
@pytest.mark.parametrize("command", ["test", "predict"])
def test_an_evaluation_stops_and_writes_nothing(
    tmp_path: Path,
    trained: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    number: int,
    said: str,
) -> None:
    capfd.readouterr()
    callback = ["--trainer.callbacks+=test_signals.Told", "--trainer.callbacks.number"]
    handler = signal.getsignal(signal.SIGINT)
    try:
        with chdir(tmp_path):
            options = ["--trainer.accelerator", "cpu", *callback, str(int(number))]
            assert main([command, "--ckpt_path", str(trained), *options]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on
    assert told(capfd) == [said]
    assert not (tmp_path / "predictions.csv").exists()


def test_one_key_that_arrives_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on what the terminal has sent to all."""
    callback = Interruptions()
    callback._note(signal.SIGINT, None)
    callback._note(signal.SIGINT, None)
    later = time.monotonic() + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        callback._note(signal.SIGINT, None)


def test_ctrl_c_during_imports_shows_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from gpd_cli.__main__ import main\n"
        "main(['fit', '-c', 'none.yaml'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": importable()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


@pytest.mark.slow
def test_torchrun_takes_a_clean_stop_for_success(tmp_path: Path) -> None:
    (tmp_path / "stop.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Stop(Callback):\n"
        "    def on_before_backward(self, trainer, *_):\n"
        "        if trainer.global_step == 9 and trainer.is_global_zero:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    config = Path(__file__).parents[2] / "configs" / "digits.yaml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "gpd_cli", "fit", "-c", str(config)),
            *("--trainer.callbacks+=stop.Stop", "--trainer.max_epochs", "3"),
            *("--data.batch_size", "8"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": importable(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gpd:")]
    command = "torchrun ... -m gpd_cli fit --resume runs/digits/version_0"
    assert line.endswith(f"go on with: {command}")
