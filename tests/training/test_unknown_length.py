"""Runs on data of one's own that is read in order and has no length."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from runs import ALONE, STOP, checkpoint, fit, logged

BATCHES = 4


class Unmeasured(IterableDataset[tuple[Tensor, int]]):
    """As many images as four batches take, which only who reads them knows."""

    def __init__(self, batch_size: int) -> None:
        self.count = BATCHES * batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        draws = torch.Generator().manual_seed(0)
        for number in range(self.count):
            yield torch.randn(1, 16, 16, generator=draws), number % 10


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8, image_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(Unmeasured(self.batch_size), self.batch_size)

    val_dataloader = train_dataloader


OPTIONS = [
    *ALONE,
    *("--data", "test_unknown_length.Data", "--data.batch_size", "8"),
    *("--trainer.limit_train_batches", "1.0", "--trainer.log_every_n_steps", "1"),
]


@pytest.mark.parametrize("sched", ["none", "constant"])
def test_a_rate_that_stays_needs_no_length(tmp_path: Path, sched: str) -> None:
    assert fit(tmp_path, *OPTIONS, "--model.optimizer.sched", sched, epochs=2) == 0
    assert checkpoint(tmp_path)["global_step"] == 2 * BATCHES


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sched": "constant"}, [0.03] * 6),
        ({"sched": "constant", "warmup_epochs": "1"}, [0.0, 0.01, 0.02, 0.03, 0.03, 0.03]),
        (
            {"sched": "step", "sched_args": "{decay_epochs: 1, decay_rate: 0.5}"},
            [0.03] * 3 + [0.015] * 3,
        ),
    ],
)
def test_schedules_that_need_no_length_work_in_a_run_without_end(
    tmp_path: Path, options: dict[str, str], expected: list[float]
) -> None:
    settings = {"lr": "0.03", "warmup_lr": "0", **options}
    named = [word for n, value in settings.items() for word in (f"--model.optimizer.{n}", value)]
    each_step = ["--trainer.log_every_n_steps", "1"]
    assert fit(tmp_path, *ALONE, *named, *each_step, *STOP, epochs=-1) == 0
    assert [float(row["lr"]) for row in logged(tmp_path) if row.get("lr")] == pytest.approx(
        expected
    )


@pytest.mark.parametrize("epochs", [2, -1])
def test_a_schedule_is_as_long_as_the_steps(tmp_path: Path, epochs: int) -> None:
    steps = ["--trainer.max_steps", "6", "--model.optimizer.lr", "0.05"]
    assert fit(tmp_path, *OPTIONS, *steps, epochs=epochs) == 0
    assert checkpoint(tmp_path)["global_step"] == 6
    rates = [float(row["lr"]) for row in logged(tmp_path) if row.get("lr")]
    assert rates[0] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "set --trainer.max_steps, since the training data does not state its length"),
        (["warmup_epochs", "1"], "warmup_epochs counts epochs"),
        (["cooldown_epochs", "1"], "cooldown_epochs counts epochs"),
        (["sched", "multistep"], "sched multistep counts epochs"),
        (["sched", "wsd", "sched_args", "{decay_epochs: 2}"], "sched_args.decay_epochs counts"),
    ],
)
def test_what_counts_epochs_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    named = [f"--model.optimizer.{word}" if k % 2 == 0 else word for k, word in enumerate(options)]
    steps = ["--trainer.max_steps", "6"] if options else []
    assert fit(tmp_path, *OPTIONS, *named, *steps, epochs=2) == 1
    assert said in capfd.readouterr().err.splitlines()[-1]


class Measured(Unmeasured):
    def __len__(self) -> int:
        return self.count


class Either(Data):
    def __init__(self, measured: bool = False) -> None:
        super().__init__()
        self.measured = measured

    def train_dataloader(self) -> Any:
        return DataLoader((Measured if self.measured else Unmeasured)(8), 8)

    def val_dataloader(self) -> Any:
        return DataLoader(Measured(8), 8)


def test_the_last_update_of_a_stream_is_the_mean_of_its_batches(tmp_path: Path) -> None:
    """Of four batches, three make an update, and the last one makes another."""
    options = [*OPTIONS, "--data", "test_unknown_length.Either"]
    options = [option for option in options if option not in ("--data.batch_size", "8")]
    options += ["--trainer.accumulate_grad_batches", "3", "--model.optimizer.sched", "none"]
    weights = []
    for version, measured in enumerate(("true", "false")):
        assert fit(tmp_path, *options, "--data.measured", measured) == 0
        weights.append(checkpoint(tmp_path, version=version)["state_dict"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)
