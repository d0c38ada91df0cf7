"""The coverage command: which networks it tries, how it resumes, and the table it writes."""

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from bench.coverage import __main__ as command
from bench.coverage import check as checking
from bench.coverage.architectures import (
    Target,
    UnknownNameError,
    named_targets,
    smallest,
    timm_modules,
    torchvision_names,
)
from bench.coverage.check import Settings, check
from bench.coverage.isolate import Limits, run_isolated
from bench.coverage.table import append_result, read_results, render

EXACT = {
    "outcome": "exact",
    "reason": "",
    "size": [3, 64, 64],
    "classes": None,
    "parameters": 100,
    "wide_parameters": 330,
    "eval_error": 2e-16,
    "train_error": 3e-15,
    "extraction": True,
}
TOO_LARGE = {"outcome": "limit", "reason": "too much memory", "out_of_memory": True}
VERSIONS = {"timm": "1.2.3", "torch": "4.5.6", "torchvision": "0.7.8"}
SETTINGS = {"ratio": 2, "branches": 3, "steps": 2}


def page(*results: dict[str, Any]) -> str:
    return render(results, VERSIONS, SETTINGS, modules=98, networks=80)


def row(text: str, network: str) -> list[str]:
    """The cells of the one row that is about a network."""
    rows = [line for line in text.splitlines() if f"| {network} " in line]
    assert len(rows) == 1
    return [cell.strip() for cell in rows[0].strip("|").split(" | ")]


def test_an_exact_network_has_its_worst_error_and_its_parameter_ratio_in_the_table() -> None:
    text = page({"name": "net_s", "family": "net", **EXACT})
    assert row(text, "net_s") == ["net", "net_s", "64", "3e-15", "3.30", "exact", ""]
    assert "1 of 98 timm modules, 0 of 80 torchvision models" in text
    assert all(f"{name} {version}" in text for name, version in VERSIONS.items())


def test_a_network_without_success_has_its_reason_in_the_table_and_does_not_count() -> None:
    text = page(
        {"name": "net_s", "family": "net", "outcome": "refused", "reason": "a|b does\nnot widen."},
        {"name": "torchvision/other", "family": "torchvision", **EXACT},
        {"name": "net_l", "family": "", **EXACT, "classes": 10, "shortened": True},
    )
    assert row(text, "net_s")[3] == "refused: a\\|b does not widen."
    assert row(text, "other")[0] == "torchvision"
    assert row(text, "net_l")[1] == "net_l (fewer blocks, num_classes=10)"
    assert "0 of 98 timm modules, 1 of 80 torchvision models" in text


def test_only_results_of_the_same_versions_and_settings_count_and_the_last_one_wins(
    tmp_path: Path,
) -> None:
    path = tmp_path / "results.jsonl"
    key = {"versions": VERSIONS, "settings": SETTINGS}
    old = {**key, "versions": {**VERSIONS, "timm": "1.0.0"}}
    append_result(path, {"name": "a", "outcome": "refused", **key})
    append_result(path, {"name": "b", "outcome": "exact", **old})
    with path.open("a") as file:
        file.write('{"name": "cut off')
    append_result(path, {"name": "a", "outcome": "exact", **key})
    results = read_results(path, key)
    assert {name: result["outcome"] for name, result in results.items()} == {"a": "exact"}


def test_the_smallest_network_has_the_fewest_parameters() -> None:
    for module in ("pit", "repghost"):
        parameters = {
            name: sum(p.numel() for p in timm.create_model(name).parameters())
            for name in timm.list_models(module=module)
        }
        assert len(parameters) > 1
        assert smallest(module) == min(parameters, key=parameters.__getitem__)


def test_names_are_modules_networks_and_libraries(tmp_path: Path) -> None:
    cache = tmp_path / "smallest.json"
    targets = named_targets(["ghostnet", "ghostnet_100", "torchvision/resnet18"], cache)
    assert targets == [
        Target("ghostnet_050", "ghostnet"),
        Target("ghostnet_100", ""),
        Target("torchvision/resnet18", "torchvision"),
    ]
    assert named_targets(["ghostnet_050"], cache) == targets[:1]
    assert len(named_targets(["torchvision"], cache)) == len(torchvision_names())
    with pytest.raises(UnknownNameError, match=r"'ghostnett'.*ghostnet"):
        named_targets(["ghostnett"], cache)


def test_the_choice_is_kept_for_the_same_version_of_timm_only(tmp_path: Path) -> None:
    cache = tmp_path / "smallest.json"
    cache.write_text(json.dumps({"timm": timm.__version__, "smallest": {"pit": "kept"}}))
    assert named_targets(["pit"], cache) == [Target("kept", "pit")]
    cache.write_text(json.dumps({"timm": "0.0", "smallest": {"pit": "kept"}}))
    assert named_targets(["pit"], cache) == [Target("pit_ti_224", "pit")]


def test_networks_of_ours_are_none_of_timms() -> None:
    assert "resnet" in timm_modules()
    assert "cifar_resnet" in timm.list_modules()
    assert "cifar_resnet" not in timm_modules()


class Classifier(nn.Module):
    """A small network; optionally one that mixes channels by position, which cannot be widened."""

    def __init__(self, roll: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.roll = roll
        self.drop = 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x.cumsum(1) if self.roll else x
        return self.head(nn.functional.dropout(x.mean((2, 3)), self.drop, self.training))


def silent(stage: str) -> None:
    """Take no notice of what is done next."""


@pytest.fixture
def create(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], nn.Module]], None]:
    def use(make: Callable[[], nn.Module]) -> None:
        monkeypatch.setattr(checking, "create_model", lambda name, **options: make())

    return use


def test_a_network_is_expanded_trained_and_extracted(
    create: Callable[[Callable[[], nn.Module]], None],
) -> None:
    create(Classifier)
    stages: list[str] = []
    result = check("small", stages.append, Settings(), threads=1)
    assert result["outcome"] == "exact"
    assert result["extraction"] is True
    assert result["size"] == (3, 128, 128)
    assert 0 <= max(result["eval_error"], result["train_error"]) < 1e-12
    assert result["parameters"] == 4 * 28 + 8 + 25
    assert result["wide_parameters"] == 8 * 28 + 16 + 45
    assert result["moved"] > 0.9
    assert [stage.split()[0] for stage in stages] == [
        "build",
        "expand",
        "compare",
        "train",
        "extract",
    ]


def test_a_network_that_cannot_be_expanded_is_refused_with_the_reason(
    create: Callable[[Callable[[], nn.Module]], None],
) -> None:
    create(lambda: Classifier(roll=True))
    result = check("small", silent, Settings())
    assert result["outcome"] == "refused"
    assert "head (Linear) cannot be widened" in result["reason"]
    assert result["size"] == (3, 224, 224)  # its own had the last word


def test_images_are_as_small_as_the_network_takes_and_no_larger_than_usual(
    create: Callable[[Callable[[], nn.Module]], None],
) -> None:
    class Particular(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] % 28 == 0
            return super().forward(x)

    create(Particular)
    assert check("small", silent, Settings())["size"] == (3, 140, 140)
    stages: list[str] = []
    create(lambda: Particular(roll=True))
    check("small", stages.append, Settings())
    assert stages[1] == "expand at 140 px"
    assert stages[2].startswith("expand at 224 px (refused at 140 px: head (Linear)")


def test_a_network_without_a_classifier_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
        network = Classifier()
        network.num_classes = num_classes or 0
        network.head = nn.Linear(4, num_classes) if num_classes else nn.Identity()
        return network

    monkeypatch.setattr(checking, "create_model", make)
    result = check("small", silent, Settings())
    assert (result["outcome"], result["classes"]) == ("exact", 10)
    assert result["parameters"] == 4 * 28 + 8 + 50


def test_steps_are_taken_in_float64_where_float32_overflows(
    create: Callable[[Callable[[], nn.Module]], None],
) -> None:
    class Loud(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1e30 * 1e20

    create(Loud)
    result = check("small", silent, Settings())
    assert result["outcome"] == "exact"
    assert result["dtype"] == "float64"


def test_an_expansion_that_is_off_or_an_extraction_that_differs_is_no_success(
    create: Callable[[Callable[[], nn.Module]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    create(Classifier)
    extract = checking.Pair.extract

    def careless(pair: checking.Pair) -> nn.Module:
        student = extract(pair)
        with torch.no_grad():
            student.get_parameter("head.bias").mul_(1.001)
        return student

    with monkeypatch.context() as patch:
        patch.setattr(checking.Pair, "extract", careless)
        result = check("small", silent, Settings())
        assert (result["outcome"], result["extraction"]) == ("inexact", False)
        assert "the extracted network is off by" in result["reason"]
        assert "the reloaded network is off by" in result["reason"]

    def sloppy(student: nn.Module, **options: Any) -> checking.Pair:
        pair = expand(student, **options)
        with torch.no_grad():
            pair.teacher.get_parameter("norm.bias").add_(1e-6)
        return pair

    expand = checking.expand
    monkeypatch.setattr(checking, "expand", sloppy)
    result = check("small", silent, Settings())
    assert result["outcome"] == "inexact"
    assert "off by" in result["reason"]


# Stands for networks: one that is done, hangs, dies, raises, or wants too much memory. It is a
# module of its own because processes would import torch with this one.
PRETEND = """
import os, time

def work(task, report):
    report("working")
    if task == "hang":
        time.sleep(60)
    if task == "die":
        os._exit(7)
    if task == "raise":
        raise KeyError("what")
    if task == "grow":
        hoard = bytearray(b"x") * 2**28
        time.sleep(60)
    return {"outcome": "exact", "reason": ""}
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is watched in /proc")
def test_a_task_can_neither_hang_nor_crash_nor_eat_up_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pretend_networks.py").write_text(PRETEND)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("pretend_networks").work
    tasks = ["hang", "grow", "die", "raise", "done"]
    results = dict(run_isolated(tasks, work, Limits(seconds=3, gibibytes=0.2), jobs=5))
    assert {task: result["outcome"] for task, result in results.items()} == {
        "hang": "limit",
        "grow": "limit",
        "die": "error",
        "raise": "error",
        "done": "exact",
    }
    assert "3 s, in stage 'working'" in results["hang"]["reason"]
    assert "0.2 GiB of memory" in results["grow"]["reason"] and results["grow"]["out_of_memory"]
    assert "(7)" in results["die"]["reason"]
    assert "KeyError in stage 'working': 'what'" in results["raise"]["reason"]
    assert results["done"]["gibibytes"] > 0


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = {"a": "exact", "b": "refused", "c": "error"}
    tried: list[list[str]] = []

    def run(tasks: dict[str, str], *args: Any, **options: Any) -> Any:
        tried.append(list(tasks))
        yield from ((t, {**EXACT, "outcome": outcomes[t], "reason": "why"}) for t in tasks)

    targets = [Target(name, f"family_{name}") for name in outcomes]
    monkeypatch.setattr(command, "all_targets", lambda cache: targets)
    monkeypatch.setattr(command, "named_targets", lambda names, cache: targets[1:2])
    monkeypatch.setattr(command, "run_isolated", run)
    where = ["--results", str(tmp_path / "r.jsonl"), "--table", str(tmp_path / "docs" / "t.md")]

    assert command.main(["b", *where]) == 0  # a refusal is no bug
    assert command.main(where) == 1
    assert "broken: c" in capsys.readouterr().err
    outcomes["c"] = "exact"
    assert command.main(["--again", "failed", *where]) == 0
    assert command.main(where) == 0
    assert command.main(["b", *where]) == 0
    assert command.main(["--again", "all", *where]) == 0
    assert tried == [["b"], ["a", "c"], ["b", "c"], [], ["b"], ["a", "b", "c"]]
    text = (tmp_path / "docs" / "t.md").read_text()
    assert f"2 of {len(timm_modules())} timm modules" in text
    assert row(text, "b")[3] == "refused: why"


@pytest.mark.slow
def test_the_command_tries_a_real_network_in_a_process_of_its_own(tmp_path: Path) -> None:
    results, table = tmp_path / "r.jsonl", tmp_path / "t.md"
    where = ["--results", str(results), "--table", str(table)]
    assert command.main(["test_convnext", *where]) == 0
    assert row(table.read_text(), "test_convnext")[5] == "exact"
    assert json.loads(results.read_text())["gibibytes"] > 0
    assert command.main(["no_such_network", *where]) == 2


def test_what_exceeds_the_memory_is_tried_again_with_fewer_branches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(tasks: Iterable[str], work: Any, **options: Any) -> Any:
        for task in tasks:
            fits = task == "small" or work.keywords["settings"].branches < SETTINGS["branches"]
            yield task, dict(EXACT if fits else TOO_LARGE)

    targets = [Target(name, f"family_{name}") for name in ("large", "small")]
    monkeypatch.setattr(command, "all_targets", lambda cache: targets)
    monkeypatch.setattr(command, "run_isolated", run)
    table = tmp_path / "t.md"
    assert command.main(["--results", str(tmp_path / "r.jsonl"), "--table", str(table)]) == 0
    assert row(table.read_text(), "large")[1] == "large (2 branches)"
    assert row(table.read_text(), "large")[5] == "exact"
    assert row(table.read_text(), "small")[1] == "small"
