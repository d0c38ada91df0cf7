"""Checkpoints of the paper's authors' code (guoyongcs/GPD) come out as the plain student.

Beside `gpd_cli` stands what their student computes, branch by branch: no kernel is merged here.
"""

import argparse
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gpd_cli.commands import authors_checkpoint
from gpd_cli.commands.extract import extract_command
from gpd_cli.errors import WeightsError
from gpd_cli.models import ModelSpec
from gpd_cli.widening.running.randomize import randomize

RATIO = 2
SMALL = {"layers": [2, 1, 1, 1], "channels": [4, 4, 8, 8]}


def tile(tensor: Tensor, *times: int) -> Tensor:
    return tensor.repeat(*times, *[1] * (tensor.ndim - len(times)))


def branches(conv: nn.Conv2d, generator: torch.Generator) -> dict[str, Tensor]:
    """What their layer stores: the wide factors, of which the student has the first ones."""
    grouped = conv.groups > 1
    wide_out = conv.out_channels * RATIO
    wide_in = conv.in_channels * RATIO
    fan = 1 if grouped else wide_in

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    prior = torch.empty(conv.out_channels, 3, 3)
    for c in range(conv.out_channels):
        for y in range(3):
            for x in range(3):
                low = c < conv.out_channels / 2
                number = c + 1 if low else c + 1 - conv.out_channels / 2
                prior[c, y, x] = math.cos(math.pi * ((y if low else x) + 0.5) * number / 3)
    eye = torch.ones(wide_in, 1) if grouped else tile(torch.eye(conv.in_channels) / RATIO, 2, 2)
    return {
        "weight_orepa_origin": random(wide_out, fan, 3, 3),
        "bias_orepa_origin": random(wide_out),
        "weight_orepa_avg_conv": random(wide_out, fan, 1, 1),
        "weight_orepa_avg_avg": torch.full((3, 3), 1 / 9),
        "weight_orepa_pfir_conv": random(wide_out, fan, 1, 1),
        "weight_orepa_prior": tile(prior, RATIO),
        "weight_orepa_1x1": random(wide_out, fan, 3, 3),
        "weight_orepa_1x1_kxk_idconv1": random(wide_in, fan, 1, 1),
        "id_tensor": eye[:, :, None, None],
        "weight_orepa_1x1_kxk_conv2": random(wide_out, fan, 3, 3),
        "weight_orepa_gconv_dw": random(wide_in * 8, 1, 3, 3),
        "weight_orepa_gconv_pw": random(wide_out, fan * 8, 1, 1),
        "vector": random(6, wide_out),
    }


class Branched(nn.Module):
    """Their student's layer, run branch by branch."""

    def __init__(self, conv: nn.Conv2d, stored: dict[str, Tensor]) -> None:
        super().__init__()
        self.conv, self.stored = conv, stored

    def forward(self, x: Tensor) -> Tensor:
        s, conv, groups = self.stored, self.conv, self.conv.groups
        out, ins = conv.out_channels, conv.in_channels
        fan = ins // groups
        scale = RATIO if groups == 1 else 1

        def run(x: Tensor, key: str, padding: int = 0) -> Tensor:
            weight = s[key][:out, :fan] * scale
            return F.conv2d(x, weight, padding=padding, groups=groups)

        first = (s["weight_orepa_1x1_kxk_idconv1"] + s["id_tensor"])[:ins, :fan] * scale
        inner = F.conv2d(x, first, groups=groups)
        spread = F.conv2d(x, s["weight_orepa_gconv_dw"][: ins * 8], padding=1, groups=ins)
        point = s["weight_orepa_gconv_pw"][:out, : fan * 8] * scale
        prior = s["weight_orepa_prior"][:out, None]
        outputs = (
            run(x, "weight_orepa_origin", 1),
            F.avg_pool2d(run(x, "weight_orepa_avg_conv"), 3, 1, 1),
            F.conv2d(run(x, "weight_orepa_pfir_conv"), prior, padding=1, groups=out),
            run(inner, "weight_orepa_1x1_kxk_conv2", 1),
            run(x, "weight_orepa_1x1", 1),
            F.conv2d(spread, point, groups=groups),
        )
        gates = s["vector"][:, :out, None, None]
        bias = s["bias_orepa_origin"][:out, None, None] * scale
        return sum(g * o for g, o in zip(gates, outputs, strict=True)) + bias


def theirs(student: nn.Module, names: dict[str, str], *, branched: bool) -> dict[str, Tensor]:
    """A state dict of their teacher; the student becomes what theirs computes."""
    generator = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    layers = [(name, m) for name, m in student.named_modules() if m._parameters or m._buffers]
    last = [name for name, m in layers if isinstance(m, nn.Linear)][-1]
    stem = next(name for name, m in layers if isinstance(m, nn.Conv2d))
    for name, module in layers:
        own, key = module.state_dict(), names.get(name, name)
        grouped = getattr(module, "groups", 1) > 1
        if (
            branched
            and isinstance(module, nn.Conv2d)
            and ((module.kernel_size, module.stride) == ((3, 3), (1, 1)))
        ):
            stored = branches(module, generator)
            owner, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(owner), leaf, Branched(module, stored))
            state |= {f"{key}.{part}": value for part, value in stored.items()}
            continue
        for part, tensor in own.items():
            scale = RATIO if isinstance(module, nn.Conv2d | nn.Linear) and not grouped else 1
            times = (RATIO, RATIO) if tensor.ndim > 1 and not grouped else (RATIO,)
            if name == stem and tensor.ndim > 1:
                times = (RATIO, 1)
            if name == last:
                times, scale = ((1, RATIO) if tensor.ndim > 1 else (1,)), 1
            wide = tile(tensor / scale, *times) if tensor.ndim else tensor
            if part in ("running_mean", "running_var"):
                state[f"{key}.tiny_{part}"] = wide
                wide = torch.rand(wide.shape, generator=generator)  # the teacher's own
            state[f"{key}.{part}"] = wide
    return state


def small_resnet(classes: int) -> nn.Module:
    student = timm.create_model("resnet18", num_classes=classes, **SMALL)
    randomize(student, torch.Generator().manual_seed(1))
    return student.eval()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the authors' ResNet-18 be a narrow one."""

    class Narrow(ModelSpec):
        def __init__(self, name: str, num_classes: int | None = None) -> None:
            super().__init__(name, num_classes, SMALL)

    monkeypatch.setattr(authors_checkpoint, "ModelSpec", Narrow)


@pytest.mark.parametrize("prefix", ["", "module.", "module.student."])
def test_a_residual_network_is_what_their_student_computes(
    small: None, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    student = small_resnet(5)
    state = {prefix + key: value for key, value in theirs(student, {}, branched=True).items()}
    if "student" in prefix:
        state["module.abfs.0.conv1.weight"] = torch.zeros(1)
    content = {"state_dict": state, "arch": "resnet18", "args": argparse.Namespace(gpd_ratio=2)}
    path = tmp_path / "checkpoint-99.pth.tar"
    torch.save(content, path)
    extract_command(path, str(tmp_path / "s.safetensors"))
    said = " ".join(capsys.readouterr().out.split())
    assert "raw, of the paper's authors' code: ratio 2, branches of 7 kernels merged" in said
    plain = timm.create_model("resnet18", num_classes=5, **SMALL).eval()
    plain.load_state_dict(load_file(tmp_path / "s.safetensors"))
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), student(images), rtol=1e-3, atol=1e-4)


def test_averaged_weights_are_taken_unless_raw_ones_are_asked_for(
    small: None, tmp_path: Path
) -> None:
    raw = theirs(small_resnet(5), {}, branched=False)
    averaged = {**raw, "fc.bias": raw["fc.bias"] + 1}
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, path)
    for weights, state in (("ema", averaged), ("raw", raw)):
        extract_command(path, str(tmp_path / "s.pth"), weights=weights)
        found = torch.load(tmp_path / "s.pth", weights_only=True)
        assert torch.equal(found["fc.bias"], state["fc.bias"])


def test_statistics_that_no_step_has_changed_are_those_of_the_teacher(
    small: None, tmp_path: Path
) -> None:
    """Their code copies them when the student runs for the first time."""
    state = theirs(small_resnet(5), {}, branched=False)
    for key, value in state.items():
        if ".tiny_running_" in key:
            value.fill_(float(key.endswith("var")))
    torch.save({"state_dict": state}, tmp_path / "checkpoint-0.pth.tar")
    extract_command(tmp_path / "checkpoint-0.pth.tar", str(tmp_path / "s.pth"))
    found = torch.load(tmp_path / "s.pth", weights_only=True)
    for name in ("bn1.running_mean", "bn1.running_var"):
        assert torch.equal(found[name], state[name][: len(found[name])])


def test_images_are_prepared_as_their_code_evaluates_them(small: None, tmp_path: Path) -> None:
    state = theirs(small_resnet(5), {}, branched=False)
    torch.save({"state_dict": state}, tmp_path / "model_best.pth.tar")
    extract_command(tmp_path / "model_best.pth.tar", str(tmp_path / "s.safetensors"))
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        preparation = json.loads(file.metadata()["preprocessing"])
    assert (preparation["interpolation"], preparation["crop_pct"]) == ("bilinear", 0.875)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv1_relu", "rvt_tiny"])
def test_their_other_networks(name: str, tmp_path: Path) -> None:
    student = timm.create_model(name, num_classes=7)
    randomize(student, torch.Generator().manual_seed(1))
    student.eval()
    names = {}
    if name == "mobilenetv1_relu":
        order = [m for m in student.named_modules() if m[1]._parameters or m[1]._buffers]
        places = [(0, 0), (0, 1)] + [(i, j) for i in range(1, 14) for j in (0, 1, 3, 4)]
        names = {m[0]: f"model.{i}.{j}" for m, (i, j) in zip(order, places, strict=False)}
        names["classifier"] = "fc"
    state = theirs(student, names, branched=name == "mobilenetv1_relu")
    torch.save({"state_dict": state}, tmp_path / "theirs.pth.tar")
    extract_command(tmp_path / "theirs.pth.tar", f"{tmp_path}/s.pth")
    plain = timm.create_model(name, num_classes=7).eval()
    plain.load_state_dict(torch.load(tmp_path / "s.pth", weights_only=True))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), student(images), rtol=1e-3, atol=1e-4)


def test_networks_of_theirs_that_are_not_known_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": {"stage.bn.tiny_running_mean": torch.ones(2)}}, path)
    with pytest.raises(
        WeightsError, match=r"of the paper's authors' code for a network other than resnet18"
    ):
        extract_command(path, str(tmp_path / "s.pth"))


@pytest.mark.parametrize("lacking", ["layer1.0.conv1.vector", "bn1.tiny_running_var", "damage"])
def test_a_broken_file_of_theirs_is_told_in_a_sentence(
    small: None, tmp_path: Path, lacking: str
) -> None:
    state = theirs(small_resnet(5), {}, branched=True)
    state.pop(lacking, None)
    path = tmp_path / "checkpoint-99.pth.tar"
    torch.save({"state_dict": state}, path)
    if lacking == "damage":
        content = path.read_bytes()
        weights = state["fc.weight"].numpy().tobytes()
        assert weights in content
        path.write_bytes(content.replace(weights, weights[:-1] + b"\x07"))
    reason = "is damaged" if lacking == "damage" else "cannot be used .*write the file again"
    with pytest.raises(WeightsError, match=f"checkpoint-99.pth.tar {reason}"):
        extract_command(path, str(tmp_path / "s.pth"))
    assert not (tmp_path / "s.pth").exists()
