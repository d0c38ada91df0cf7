"""What one process finds and the others receive: the width plan, its certificate, or an error."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gpd_cli import Pair, expand
from gpd_cli.distributed import first_process
from gpd_cli.distributed.first_process import (
    Exchange,
    FileExchange,
    StoreExchange,
    left_for_children,
    together,
)
from gpd_cli.errors import ExpansionError, TrainingError
from gpd_cli.teacher import expansion
from gpd_cli.teacher.found_once import grown_once, what_was_found
from processes import free_port, in_processes, slurm_tasks

SAMPLE = torch.zeros(2, 3, 8, 8)


def network(last: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)
    return nn.Sequential(*layers, last or nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def grow(**found: Any) -> Pair:
    generator = torch.Generator().manual_seed(3)
    return expand(network(), sample=SAMPLE, ratio=2, branches=3, generator=generator, **found)


@contextmanager
def meeting(monkeypatch: pytest.MonkeyPatch, exchange: Exchange) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(first_process, "_found_exchange", lambda: exchange)
        with together():
            yield


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("only the first process searches and compares")


def same(one: Pair, other: Pair) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


def test_the_others_build_the_same_pair_without_search(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    with meeting(monkeypatch, StoreExchange(lambda: store, 0, 0)):
        first = grown_once(grow)
    monkeypatch.setattr(expansion, "find_plan", never)
    monkeypatch.setattr(expansion, "certify", never)
    with meeting(monkeypatch, StoreExchange(lambda: store, 1, 0)):
        other = grown_once(grow)
    assert same(first, other)
    assert other.certificate == first.certificate is not None
    assert other.plan == first.plan
    with left_for_children(what_was_found(first)):
        from_file = first_process._found_exchange()
        assert isinstance(from_file, FileExchange)
        with meeting(monkeypatch, from_file):
            assert same(first, grown_once(grow))
    assert first_process._found_exchange() is None


def test_by_its_plan_an_expansion_is_the_same() -> None:
    first = grow()
    assert same(first, grow(plan=first.plan))


def test_a_certificate_without_its_plan_is_refused() -> None:
    with pytest.raises(ExpansionError, match="give the plan as well"):
        grow(certificate=grow().certificate)


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (ExpansionError("Nothing fits; choose ratio 1."), "Nothing fits; choose ratio 1."),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_an_error_of_the_first_process_is_that_of_all(
    raised: Exception, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**found: Any) -> Pair:
        raise raised

    store = dist.HashStore()
    with pytest.raises(type(raised)), meeting(monkeypatch, StoreExchange(lambda: store, 0, 0)):
        grown_once(fails)
    with (
        pytest.raises(ExpansionError) as error,
        meeting(monkeypatch, StoreExchange(lambda: store, 1, 0)),
    ):
        grown_once(never)
    assert str(error.value) == text


def test_the_first_process_waits_until_all_have_read() -> None:
    store = dist.HashStore()
    first, other = (StoreExchange(lambda: store, rank, 2) for rank in (0, 1))
    first.give({"plan": 1})
    reader = threading.Timer(0.2, other.receive)
    reader.start()
    assert other.receive() == {"plan": 1}
    first.wait_for_readers(timedelta(minutes=1))
    assert store.add("read", 0) == 2
    reader.join()


def test_the_end_of_the_first_process_is_noticed() -> None:
    keeper = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", keeper.port, is_master=False, wait_for_workers=False)
    del keeper
    with pytest.raises(TrainingError, match="see the error message of the first process"):
        StoreExchange(lambda: store, 1, 1).receive()


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is gone"):
        FileExchange(str(tmp_path / "none.json")).receive()


COUNTING = """
import os, sys
from pathlib import Path
from gpd_cli.__main__ import main
from gpd_cli.teacher import expansion

def counted(name):
    function = getattr(expansion, name)
    def call(*args, **options):
        Path(f"{name}_{os.getpid()}").touch()
        return function(*args, **options)
    setattr(expansion, name, call)

if __name__ == "__main__":
    counted("find_plan"), counted("certify")
    sys.exit(main(sys.argv[1:]))
"""
TINY = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
FIT = [
    *("fit", "--model.student", "resnet18", "--model.student_args", json.dumps(TINY)),
    *("--model.num_classes", "10", "--data.dataset", "digits", "--data.image_size", "16"),
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
]


def launched(folder: Path, launcher: str, options: list[str]) -> list[Any]:
    (folder / "counting.py").write_text(COUNTING)
    script = ["counting.py", *options]
    if launcher == "lightning":
        return in_processes(folder, [sys.executable, *script])
    if launcher == "slurm":
        return in_processes(folder, [sys.executable, *script], slurm_tasks(2))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return in_processes(folder, [*run, "--master_port", free_port(), *script])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "slurm"])
def test_one_of_two_processes_searches(launcher: str, tmp_path: Path) -> None:
    for result in launched(tmp_path, launcher, FIT):
        assert result.returncode == 0, result.stderr
    assert len([*tmp_path.glob("find_plan_*")]) == len([*tmp_path.glob("certify_*")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "slurm"])
def test_a_refusal_ends_all_processes(launcher: str, tmp_path: Path) -> None:
    options = [*FIT, "--model.exclude", "*"]
    results = launched(tmp_path, launcher, options)
    said = "".join(result.stderr for result in results)
    assert all(result.returncode == 1 for result in results), said
    assert said.count("every layer is excluded") == (1 if launcher == "lightning" else 2)
    assert 'counting.py", line' not in said.replace(str(tmp_path), "")
    assert len([*tmp_path.glob("find_plan_*")]) <= 1


def test_processes_with_nothing_to_tell_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may have gone on, and closed its store, before another one reaches it."""

    def connect() -> None:
        pytest.fail("a process waits for the store")

    for rank in (0, 1):
        with meeting(monkeypatch, StoreExchange(connect, rank, 1)):
            pass
