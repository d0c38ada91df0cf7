"""Settings by the pair of networks: those of the CIFAR-100 literature, found by two files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpd_cli.__main__ import main
from gpd_cli.distill.methods.pairs import for_pair
from gpd_cli.errors import MethodError
from gpd_cli.files import save_tensors
from gpd_cli.models import create_model

CONFIGS = Path(__file__).parents[2] / "configs"
# Student: DKD's beta, ReviewKD's weight. From the configurations of DKD's authors and the script of
# ReviewKD's, who have no pairs of vgg13.
PUBLISHED = {
    "mobilenetv2_half": (6.0, 1.0),
    "resnet20": (2.0, 0.6),
    "resnet32": (2.0, 1.0),
    "resnet8x4": (8.0, 5.0),
    "shufflenetv1": (8.0, 5.0),
    "shufflenetv2": (8.0, 8.0),
    "vgg8": (6.0, 1.0),
    "wrn_16_2": (6.0, 5.0),
    "wrn_40_1": (6.0, 5.0),
}


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONFIGS / path).read_text())
    return content


def test_every_pair_of_the_folder_is_published_here() -> None:
    pairs = {path.stem for path in (CONFIGS / "cifar100").glob("*.yaml")} - {
        "base",
        "alone",
        "two_cores",
    }
    assert pairs == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_pair_has_the_settings_of_the_literature(name: str) -> None:
    pair = read(f"cifar100/{name}.yaml")
    teacher, student = pair["model.static_teacher.name"], pair["model.student"]
    for method, setting, value in zip(
        ("dkd", "reviewkd"), ("beta", "weight"), PUBLISHED[name], strict=True
    ):
        settings = read(f"methods/{method}.yaml")["model.method"]["init_args"]
        assert for_pair(settings, teacher, student)[setting] == value


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"alpha": 1.0, "beta": 2.0, "temperature": 4.0}),
        (["--model.method.beta", "3"], {"alpha": 1.0, "beta": 3, "temperature": 4.0}),
        (["--model.static_teacher.name", "cifar_resnet20"], {"beta": 8.0}),
    ],
)
def test_a_run_has_the_settings_of_its_pair(
    options: list[str],
    expected: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = "cifar_resnet20" if "cifar_resnet20" in options else "cifar_resnet56"
    torch.manual_seed(0)
    save_tensors(Path("t.safetensors"), create_model(teacher, num_classes=10).state_dict())
    # The digits, in colour.
    small = ["--data.dataset", "digits", "--data.image_size", "16", "--data.batch_size", "32"]
    small += ["--data.in_chans", "3", "--data.cache", "none"]
    small += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    small += ["--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    small += ["--model.num_classes", "10", "--model.ratio", "1", "--model.branches", "1"]
    files = [f"{CONFIGS}/cifar100/resnet20.yaml", f"{CONFIGS}/methods/dkd.yaml"]
    command = ["fit", "-c", files[0], "-c", files[1], *options, *small]
    assert main([*command, "--model.static_teacher.weights", "t.safetensors"]) == 0
    (written,) = Path("runs").rglob("config.yaml")
    settings = yaml.safe_load(written.read_text())["model"]["method"]["init_args"]
    assert {name: settings[name] for name in expected} == expected


def test_other_settings_stay_as_they_are() -> None:
    settings = {"alpha": 1.0, "mine": {"otherwise": 2, "depth": 3}, "names": ["a -> b"]}
    assert for_pair(settings, "a", "b") == settings


def test_a_pair_without_an_entry_is_named() -> None:
    table = {"beta": {"a->b": 2.0}}
    assert for_pair(table, "a", "b") == {"beta": 2.0}
    with pytest.raises(MethodError, match=r"beta .*'b -> a'.*--model\.method\.beta"):
        for_pair(table, "b", "a")
