"""What `gpd extract` writes is complete, and runs where there is no gpd."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import runs
from gpd_cli import expand
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.exports.about import About, Which
from gpd_cli.commands.exports.card import facts_of_run, model_card, settings_of_run
from gpd_cli.commands.exports.fuse import fuse_batch_norms
from gpd_cli.commands.exports.program import trace
from gpd_cli.commands.extract import extract_command
from gpd_cli.data import ImageSpec
from gpd_cli.errors import GpdError
from gpd_cli.models import ModelSpec
from gpd_cli.teacher.checkpoint import load_networks, save_expanded
from gpd_cli.teacher.description import Description
from gpd_cli.widening.running.randomize import randomize

CLASSES = ("ant", "bee", "café")
ARGUMENTS = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
IMAGES = ImageSpec(
    class_names=CLASSES,
    size=(32, 32),
    channels=3,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
    crop_pct=0.875,
    interpolation="bicubic",
)
FORMS = ("s.safetensors", "s.pth", "s.pt2", "s.onnx", "folder/")


def saved(
    folder: Path,
    name: str = "resnet18",
    arguments: dict[str, object] | None = None,
    images: ImageSpec | None = IMAGES,
    size: int = 32,
) -> Path:
    """A file with an expanded student, its statistics random."""
    spec = ModelSpec(name, len(CLASSES), ARGUMENTS if arguments is None else arguments)
    student = spec.build()
    randomize(student, torch.Generator().manual_seed(1))
    shape = (3, size, size)
    pair = expand(student, sample=torch.zeros(2, *shape), branches=["1x1"])
    path = folder / "wide.safetensors"
    save_expanded(path, pair, Description(spec, pair.plan, shape, ("1x1",), images=images))
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def exported(wide: Path) -> Path:
    """A folder with the student in every form."""
    for form in FORMS:
        extract_command(wide, f"{wide.parent}/{form}")
    return wide.parent


def picture(height: int = 60, width: int = 47) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gpd_cli":
            raise ImportError("there is no gpd here")

sys.meta_path.insert(0, Blocked())
import json, timm, torch, onnxruntime
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

given = torch.load("images.pt")
images, wanted = given["images"], given["logits"]

def build():
    return timm.create_model("resnet18", num_classes=3, **json.loads(sys.argv[1])).eval()

folder = timm.create_model("local-dir:folder", pretrained=True).eval()
networks = {"folder": folder}
for form, load in (("s.safetensors", load_file), ("s.pth", torch.load)):
    networks[form] = build()
    networks[form].load_state_dict(load(form))
networks["s.pt2"] = torch.export.load("s.pt2").module()
with torch.no_grad():
    for form, network in networks.items():
        for count in (1, 3):
            difference = (network(images[:count]) - wanted[:count]).abs().max()
            # Another batch size may be computed in another order.
            allowed = 0 if form != "s.pt2" and count == 3 else 1e-5
            assert difference <= allowed, (form, count, difference)
session = onnxruntime.InferenceSession("s.onnx")
for count in (1, 3):
    (logits,) = session.run(["logits"], {"images": images[:count].numpy()})
    assert abs(logits - wanted[:count].numpy()).max() < 1e-4
assert "gpd_cli" not in sys.modules
print(json.dumps([folder.pretrained_cfg["label_names"], resolve_model_data_config(folder)]))
"""


@pytest.mark.slow
def test_every_form_runs_without_gpd_and_is_the_student(exported: Path) -> None:
    network, _ = load_networks(exported / "wide.safetensors")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = network.student(images)
    torch.save({"images": images, "logits": logits}, exported / "images.pt")
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(ARGUMENTS)],
        cwd=exported,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    names, data = json.loads(ran.stdout)
    assert tuple(names) == CLASSES
    assert data["input_size"] == [3, 32, 32]
    assert data["mean"] == [0.4, 0.5, 0.6]
    assert data["std"] == [0.2, 0.25, 0.3]
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bicubic")


def metadata(path: Path) -> dict[str, str]:
    if path.suffix == ".onnx":
        return {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    if path.suffix == ".pt2":
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        return json.loads(files["metadata.json"])
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["s.safetensors", "s.pt2", "s.onnx", "folder/model.safetensors"])
def test_classes_and_preprocessing_travel_in_the_file(exported: Path, form: str) -> None:
    found = metadata(exported / form)
    assert tuple(json.loads(found["classes"])) == CLASSES
    assert json.loads(found["preprocessing"])["mean"] == [0.4, 0.5, 0.6]
    spec = {"name": "resnet18", "num_classes": 3, "model_args": ARGUMENTS}
    assert json.loads(found["model"]) == spec
    assert found["network"] == "student"


@pytest.mark.slow
def test_files_are_readable_as_umask_says_and_know_no_temporary_names(exported: Path) -> None:
    (exported / "plain").touch()
    mode = (exported / "plain").stat().st_mode
    written = [exported / form for form in FORMS[:-1]] + list((exported / "folder").iterdir())
    assert len(written) == 7
    for path in written:
        assert path.stat().st_mode == mode, path
        assert b".tmp-" not in path.read_bytes(), path
    names = [
        name for form in ("s.pth", "s.pt2") for name in zipfile.ZipFile(exported / form).namelist()
    ]
    assert all(name.startswith("archive/") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["s.pt2", "s.onnx"])
def test_programs_tell_nothing_of_the_machine_that_wrote_them(exported: Path, form: str) -> None:
    content = (exported / form).read_bytes()
    assert str(Path(timm.__file__).parents[1]).encode() not in content


@pytest.mark.slow
def test_input_and_output_of_onnx_have_names_and_an_open_batch(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "s.onnx")
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 3, 32, 32])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])


@pytest.mark.slow
def test_preprocessing_inside_takes_a_picture_as_it_is(wide: Path, tmp_path: Path) -> None:
    extract_command(wide, str(tmp_path / "p.onnx"), preprocess=True)
    extract_command(wide, str(tmp_path / "p.pt2"), preprocess=True)
    extract_command(wide, f"{tmp_path}/p/")
    network = timm.create_model(f"local-dir:{tmp_path / 'p'}", pretrained=True).eval()
    prepare = create_transform(**resolve_model_data_config(network))
    session = onnxruntime.InferenceSession(tmp_path / "p.onnx")
    program = torch.export.load(tmp_path / "p.pt2").module()
    for image in (picture(), picture(20, 90)):
        with torch.no_grad():
            wanted = network(prepare(image)[None]).numpy()
        pixels = np.asarray(image)[None]
        for logits in (
            session.run(None, {"images": pixels})[0],
            program(torch.tensor(pixels)).detach().numpy(),
        ):
            assert np.abs(logits - wanted).max() < 2e-3 * np.abs(wanted).max()
    found = metadata(tmp_path / "p.onnx")
    assert found["preprocessing_inside"] == "true"
    assert found["input"].startswith("uint8 [batch, height, width, 3]")


def test_batch_norms_are_folded(wide: Path) -> None:
    network, description = load_networks(wide)
    student = network.extract().eval()
    about = About(description.spec, "student", description.shape, description.images)
    fused = trace(student, about, preprocess=False, fuse=True, half=False)
    plain = trace(student, about, preprocess=False, fuse=False, half=False)

    def norms(traced: object) -> int:
        return sum("batch_norm" in str(node.target) for node in traced.program.graph.nodes)

    assert norms(plain) == sum(isinstance(m, nn.BatchNorm2d) for m in student.modules()) > 0
    assert norms(fused) == 0
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused.program.module()(images), student(images))


def test_batch_norms_are_folded_in_single_precision_before_rounding_to_half() -> None:
    """Small variances and their inverse roots would be rounded several times in half precision."""
    network = (
        nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3, eps=0.0)).half().eval()
    )
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    norm.running_var.copy_(torch.tensor([1e-6, 3e-6, 2e-5]))
    norm.weight.data.copy_(torch.tensor([0.2, 0.003, 0.001]))
    images = torch.randn(2, 2, 4, 4).half()
    program = torch.export.export(network, (images,)).module()
    assert isinstance(program, torch.fx.GraphModule)
    assert fuse_batch_norms(program) == 1
    conv = network[0]
    assert isinstance(conv, nn.Conv2d)
    exact = (
        conv.weight.double()
        * (norm.weight.double() / norm.running_var.double().sqrt())[:, None, None, None]
    )
    assert torch.equal(program.fused_0_weight, exact.half())


class Twice(nn.Module):
    """Reads the output of its convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return self.norm(maps) + maps


def test_a_convolution_that_others_read_as_well_keeps_its_norm() -> None:
    network, images = Twice().eval(), torch.randn(2, 2, 4, 4)
    randomize(network, torch.Generator().manual_seed(1))
    program = torch.export.export(network, (images,)).module()
    assert isinstance(program, torch.fx.GraphModule)
    assert fuse_batch_norms(program) == 0
    with torch.no_grad():
        torch.testing.assert_close(program(images), network(images))


@pytest.mark.parametrize(
    "form", [pytest.param("h.onnx", marks=pytest.mark.slow), "h.pt2", "h.safetensors", "h/"]
)
def test_half_precision_halves_the_file(wide: Path, tmp_path: Path, form: str) -> None:
    extract_command(wide, f"{tmp_path}/{form}", half=True)
    path = tmp_path / form
    images = torch.randn(2, 3, 32, 32)
    if form == "h/":
        assert metadata(path / "model.safetensors")["network"] == "student"
        network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    elif form == "h.pt2":
        network = torch.export.load(path).module()
    elif form == "h.safetensors":
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert kinds == {torch.float16, torch.int64}
        return
    else:
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].type == "tensor(float)"
        stored = onnx.load(path).graph.initializer
        assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in stored)

        def network(x: torch.Tensor) -> torch.Tensor:
            return torch.tensor(session.run(None, {"images": x.numpy()})[0])

    with torch.no_grad():
        wanted = load_networks(wide)[0].student(images)
        got = network(images)
    assert got.dtype == torch.float32
    assert 0 < (got - wanted).abs().max() < 2e-2 * wanted.abs().max()


@pytest.mark.parametrize(
    ("form", "options", "changes"),
    [
        ("s.pt2", {"half": True, "fuse_bn": True}, "folding batch norms and rounding to float16"),
        ("s.pt2", {"fuse_bn": True, "preprocess": True}, "folding batch norms"),
        ("s.safetensors", {"half": True}, "rounding to float16"),
    ],
)
def test_the_certificate_tells_what_is_written_from_what_was_trained(
    wide: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: str,
    options: dict[str, bool],
    changes: str,
) -> None:
    extract_command(wide, f"{tmp_path}/{form}", **options)
    lines = " ".join(capsys.readouterr().out.split())
    assert f"before {changes} equal to the trained network bit for bit" in lines
    written = re.search(r"as written relative difference (\S+), top-1 agreement \d+% on", lines)
    assert written is not None
    least = 1e-6 if "half" in options else 0
    assert least < float(written[1]) < 1e-2


@pytest.mark.parametrize("form", ["h.pth", "h/", "h.pt2"])
def test_numbers_beyond_float16_are_not_written_as_infinite_ones(
    wide: Path, tmp_path: Path, form: str
) -> None:
    """As the variances of a network have them whose images are bytes; random images are none."""
    network, description = load_networks(wide)
    network.narrow.bn1.running_var[1] = 1e5
    path = tmp_path / "bytes.safetensors"
    save_expanded(path, network, description)
    with pytest.raises(
        GpdError, match=r"number is 65504, bn1.running_var has values .* infinite; leave out --half"
    ):
        extract_command(path, f"{tmp_path}/{form}", half=True)
    assert [file.name for file in tmp_path.iterdir()] == ["bytes.safetensors"]


@pytest.mark.parametrize("form", ["h.pt2", pytest.param("h.onnx", marks=pytest.mark.slow)])
def test_activations_beyond_float16_are_told_before_a_program_is_written(
    wide: Path, tmp_path: Path, form: str
) -> None:
    network, description = load_networks(wide)
    with torch.no_grad():
        network.teacher.bn1.weight.fill_(6e4)
    path = tmp_path / "large.safetensors"
    save_expanded(path, network, description)
    with pytest.raises(GpdError, match=r"logits are NaN or infinite; leave out --half or --fuse"):
        extract_command(path, f"{tmp_path}/{form}", half=True, fuse_bn=True)
    assert [file.name for file in tmp_path.iterdir()] == ["large.safetensors"]
    extract_command(path, f"{tmp_path}/{form}")  # in float32 the same network has finite logits


def test_preprocessing_that_cannot_be_equal_to_that_of_training_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, images=replace(IMAGES, interpolation="nearest"))
    with pytest.raises(GpdError, match=r"not support the interpolation 'nearest'; leave out"):
        extract_command(path, f"{tmp_path}/s.pt2", preprocess=True)


@pytest.mark.parametrize("option", ["preprocess", "fuse_bn"])
@pytest.mark.parametrize("form", ["s.pth", "folder2/"])
def test_weights_alone_cannot_hold_what_changes_the_network(
    wide: Path, tmp_path: Path, form: str, option: str
) -> None:
    with pytest.raises(GpdError, match=rf"--{option} .* write a .pt2 or .onnx file"):
        extract_command(wide, f"{tmp_path}/{form}", **{option: True})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "form",
    ["s.safetensors", "folder/", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS[2:4])],
)
def test_class_names_that_are_no_text_come_back(tmp_path: Path, form: str) -> None:
    """They are names of folders, which are bytes."""
    names = ("ant", "bee", os.fsdecode(b"caf\xe9"))
    wide = saved(tmp_path, images=replace(IMAGES, class_names=names))
    extract_command(wide, f"{tmp_path}/{form}")
    file = tmp_path / ("folder/model.safetensors" if form == "folder/" else form)
    assert json.loads(metadata(file)["classes"]) == list(names)
    if form == "folder/":
        config = json.loads((tmp_path / "folder" / "config.json").read_text(encoding="utf-8"))
        assert config["label_names"] == list(names)
        assert "caf\\udce9" in (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")


def test_what_the_checkpoint_does_not_know_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, images=None)
    extract_command(path, f"{tmp_path}/plain/")
    said = " ".join(capsys.readouterr().out.split())
    assert "classes 3, without names" in said
    assert "preprocessing not in the checkpoint" in said
    network = timm.create_model(f"local-dir:{tmp_path}/plain", pretrained=True)
    assert network.pretrained_cfg["label_names"] == ["class 0", "class 1", "class 2"]
    with pytest.raises(
        GpdError, match=r"does not say how images were prepared.*; leave out --preprocess"
    ):
        extract_command(path, f"{tmp_path}/p.onnx", preprocess=True)
    assert not (tmp_path / "p.onnx").exists()


@pytest.mark.slow
def test_a_network_that_onnx_cannot_hold_is_one_sentence_that_offers_pt2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, "test_vit_relpos", {"img_size": 32})
    with pytest.raises(GpdError) as refused:
        extract_command(path, str(tmp_path / "x.onnx"))
    output, errors = capfd.readouterr()
    assert output + errors == ""
    sentence = str(refused.value)
    assert "\x1b" not in sentence
    assert "\n" not in sentence
    assert sentence.startswith("torch's ONNX exporter cannot convert test_vit_relpos (")
    assert sentence.endswith("write a .pt2 file instead, which runs wherever torch does.")
    assert [file.name for file in tmp_path.iterdir()] == ["wide.safetensors"]
    extract_command(path, str(tmp_path / "x.pt2"))


def test_an_export_replaces_an_older_one_but_nothing_else(wide: Path, tmp_path: Path) -> None:
    extract_command(wide, f"{tmp_path}/model/")
    (tmp_path / "model" / "config.json").write_text('{"gpd": "an earlier version"}')
    extract_command(wide, f"{tmp_path}/model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_classes"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(GpdError, match=r"contains other files, such as 'thesis.tex'; choose a new"):
        extract_command(wide, f"{tmp_path}/model/")


@pytest.mark.parametrize("config", [None, "{}", "by hand"])
def test_a_folder_of_another_origin_is_not_replaced_though_its_files_have_the_same_names(
    wide: Path, tmp_path: Path, config: str | None
) -> None:
    (tmp_path / "README.md").write_text("my notes")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(GpdError, match=r"gpd did not write the files that it contains; choose"):
        extract_command(wide, f"{tmp_path}/")
    assert (tmp_path / "README.md").read_text() == "my notes"


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_network_without_finite_logits_is_no_error_of_gpd(
    wide: Path, tmp_path: Path, which: Which
) -> None:
    network, description = load_networks(wide)
    for part in (network.teacher, network.narrow):
        part.bn1.running_var.zero_()
    with torch.no_grad():
        network.teacher.bn1.weight.fill_(3e38)
    path = tmp_path / "lost.safetensors"
    save_expanded(path, network, description)
    with pytest.raises(GpdError, match=rf"The {which} gives NaN or infinite logits.*checkpoint"):
        extract_command(path, str(tmp_path / "s.pth"), which)
    assert not (tmp_path / "s.pth").exists()


@pytest.mark.parametrize(
    ("module", "output", "said"),
    [
        ("extract", "s.pth", "differs from the trained one by .* nothing was written"),
        ("exports.folder", "folder/", "computes other logits .* the folder was not kept"),
    ],
)
def test_nothing_is_written_that_computes_something_else(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, output: str, said: str
) -> None:
    monkeypatch.setattr(f"gpd_cli.commands.{module}.relative_difference", lambda *_: 0.5)
    with pytest.raises(GpdError, match=said):
        extract_command(wide, f"{tmp_path}/{output}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", [".", "./"])
def test_the_working_directory_is_not_replaced_under_the_user(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """A shell would stay in the old folder, which is no more, and see no files."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GpdError, match=r"it is the working directory; give a folder inside it"):
        extract_command(wide, output)
    assert not list(Path().iterdir())


def test_networks_that_timm_alone_does_not_build_are_offered_other_forms(tmp_path: Path) -> None:
    path = saved(tmp_path, "cifar_resnet8", {})
    with pytest.raises(GpdError, match=r"timm alone cannot build cifar_resnet8.* \.pt2 or \.onnx"):
        extract_command(path, f"{tmp_path}/model/")
    assert [file.name for file in tmp_path.iterdir()] == ["wide.safetensors"]


@pytest.mark.parametrize(
    "given",
    [
        {"num_classes": 3},
        {"cache_dir": "/tmp/of-this-machine", "pretrained_cfg_overlay": {"crop_pct": 1.0}},
        {"scriptable": True, "exportable": None, "no_jit": None, "checkpoint_path": ""},
    ],
    ids=["classes", "weights", "layers"],
)
def test_arguments_of_the_factory_are_none_of_the_exported_network(
    tmp_path: Path, given: dict[str, object]
) -> None:
    path = saved(tmp_path, arguments={**ARGUMENTS, **given})
    extract_command(path, f"{tmp_path}/model/")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_args"] == ARGUMENTS
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    extract_command(path, f"{tmp_path}/s.safetensors")
    model = json.loads(metadata(tmp_path / "s.safetensors")["model"])
    built = timm.create_model(
        model["name"], num_classes=model["num_classes"], **model["model_args"]
    ).eval()
    built.load_state_dict(load_file(tmp_path / "s.safetensors"))
    with torch.no_grad():
        wanted = load_networks(path)[0].student(images)
        assert torch.equal(loaded(images), wanted)
        assert torch.equal(built(images), wanted)
    assert b"of-this-machine" not in (tmp_path / "s.safetensors").read_bytes()


def test_the_size_that_a_network_has_from_its_configuration_is_kept(tmp_path: Path) -> None:
    small = {"embed_dim": 12, "num_heads": 2, "depth": 1}
    overlay = {"pretrained_cfg_overlay": {"input_size": [3, 32, 32]}}
    path = saved(tmp_path, "vit_tiny_patch16_224", {**small, **overlay})
    extract_command(path, f"{tmp_path}/model/")
    images = torch.randn(2, 3, 32, 32)
    network = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(network(images), load_networks(path)[0].student(images))


def test_a_folder_that_timm_does_not_load_is_not_kept(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def refuse(name: str, **arguments: object) -> nn.Module:
        if name.startswith("local-dir:"):
            raise TypeError("an argument that timm does not know")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(GpdError, match=r"timm cannot load .*\(an argument .* \.pt2 or \.onnx"):
        extract_command(wide, f"{tmp_path}/model/")
    assert not list(tmp_path.iterdir())


def test_a_wide_teacher_is_a_folder_where_arguments_build_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"img_size": 32, "embed_dim": 12, "num_heads": 2, "depth": 1}
    path = saved(tmp_path, "vit_tiny_patch16_224", small)
    extract_command(path, f"{tmp_path}/wide/", which="teacher")
    said = " ".join(capsys.readouterr().out.split())
    assert "embed_dim=24, num_heads=4" in said
    teacher = timm.create_model(f"local-dir:{tmp_path}/wide", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = load_networks(path)[0](images)[1]
        torch.testing.assert_close(teacher(images), wanted)


def test_a_wide_teacher_that_no_arguments_build_has_other_forms(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GpdError, match=r"No arguments of resnet18 build .* \.pt2 or \.onnx"):
        extract_command(wide, f"{tmp_path}/wide/", which="teacher")
    extract_command(wide, f"{tmp_path}/t.pt2", which="teacher")
    said = " ".join(capsys.readouterr().out.split())
    assert "no arguments of resnet18 build this network; .pt2 and .onnx run" in said
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = load_networks(wide)[0](images)[1]
        torch.testing.assert_close(torch.export.load(tmp_path / "t.pt2").module()(images), wanted)


@pytest.mark.slow
def test_the_card_of_a_run_has_its_accuracies_and_settings(tmp_path: Path) -> None:
    told = ["--seed_everything", "3", "--trainer.gradient_clip_val", "5"]
    told += ["--trainer.callbacks+=gpd_cli.EMA", *runs.STOP]
    assert runs.fit(tmp_path, *runs.PAIRED, *told, epochs=4) == 0
    checkpoint = runs.run_folder(tmp_path) / "checkpoints" / "last.ckpt"
    extract_command(checkpoint, f"{tmp_path}/digits-model/")
    card = (tmp_path / "digits-model" / "README.md").read_text()
    accuracy = runs.last_logged(tmp_path, "val/student_top1")
    assert f"| validation accuracy, student | {accuracy:.2f} % |" in card
    assert f"| gap | {runs.last_logged(tmp_path, 'val/gap'):.2f} points |" in card
    assert "| recipe | sgd" in card
    command = "gpd extract --ckpt_path last.ckpt --output digits-model/"
    assert f"| command | `{command}` |" in card
    assert "Classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card
    assert ", epoch 2 of 4 |" in card
    assert "for `gpd fit -c FILE`, without loggers and the paths of files:" in card
    config = card.split("```yaml\n")[1].split("```")[0]
    settings = yaml.safe_load(config)
    assert settings["seed_everything"] == 3
    assert (settings["trainer"]["max_epochs"], settings["trainer"]["gradient_clip_val"]) == (4, 5)
    assert settings["trainer"]["callbacks"][0]["class_path"] == "gpd_cli.EMA"
    (tmp_path / "again.yaml").write_text(config)
    assert runs.fit(tmp_path, "-c", "again.yaml") == 0
    assert str(tmp_path) not in card
    extract_command(checkpoint, f"{tmp_path}/digits-model/", weights="raw", half=True)
    card = (tmp_path / "digits-model" / "README.md").read_text()
    assert "validation accuracy" not in card
    assert f"| command | `{command} --weights raw --half` |" in card


def test_the_card_understands_settings_in_their_older_form() -> None:
    model = {"static_teacher": "resnet34", "method": "dkd", "optimizer": {"opt": "sgd", "lr": 0.1}}
    facts = facts_of_run({"hyper_parameters": model, "epoch": 3}, averaged=True)
    assert facts["static teacher"] == "resnet34, by dkd"


def test_the_card_leaves_out_what_is_private_or_not_known() -> None:
    model = {"student": "resnet18", "student_weights": "/home/me/w.pth", "ratio": 2.0}
    content = {"hyper_parameters": model, "epoch": 3}
    settings, left_out = settings_of_run(content)
    about = About(
        ModelSpec("resnet18", 2),
        "student",
        (3, 8, 8),
        facts=facts_of_run(content, averaged=True),
        settings=settings,
        left_out=left_out,
    )
    card = model_card(about, "name")
    assert "/home/me" not in card
    assert "accuracy" not in card
    assert "without the options of the trainer, callbacks and seed, which the checkpoint" in card


def test_the_card_leaves_out_paths_in_settings_of_any_class() -> None:
    callback = {"class_path": "mine.Keep", "init_args": {"folder": "/data/me", "every": 2}}
    callback["init_args"]["dirpath"] = "runs/kept"
    data = {"class_path": "mine.Data", "init_args": {"files": ["~/a", "~/b"], "size": 8}}
    settings = {"trainer": {"callbacks": [callback], "max_steps": 9}, "data": data}
    shown, _ = settings_of_run({"settings": settings, "epoch": 3})
    assert "runs/kept" in str(settings)
    callback["init_args"] = {"every": 2}
    data["init_args"] = {"size": 8}
    assert yaml.safe_load(shown) == settings


LENGTHS = {
    "of 30": ({"run_length": {"max_epochs": 30, "max_steps": -1}}, "epoch 21 of 30"),
    "without end": ({"run_length": {"max_epochs": -1, "max_steps": -1}}, "epoch 21"),
    "of an earlier version": ({}, "epoch 21"),
    "in updates": (
        {"run_length": {"max_epochs": None, "max_steps": 500}, "global_step": 210},
        "update 210 of 500",
    ),
    "within its epoch": (
        {"schedule": {"updates_in_epoch": 4, "updates_per_epoch": 10, "updates": 204}},
        "within epoch 21",
    ),
    "within an epoch of unknown share": (
        {
            "schedule": {"updates_in_epoch": 4, "updates_per_epoch": None},
            "epoch_length": {"batches": 9, "accumulated": 2},
        },
        "within epoch 21",
    ),
    "after its last epoch": (
        {
            "epoch": 21,
            "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 21}}}},
            "schedule": {"updates_in_epoch": 10, "updates_per_epoch": 10, "updates": 210},
        },
        "epoch 21",
    ),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_card_says_where_in_its_run_a_checkpoint_is_from(name: str) -> None:
    content, position = LENGTHS[name]
    model = {"optimizer": {"opt": "sgd", "lr": 0.1, "sched": "cosine"}}
    schedule = {"updates": 210, "updates_per_epoch": 10, "updates_in_epoch": 10}
    known = {"hyper_parameters": model, "epoch": 20, "schedule": schedule, **content}
    facts = facts_of_run(known, averaged=True)
    assert facts["recipe"] == f"sgd, learning rate 0.1, schedule cosine, {position}"
    length = yaml.safe_load(settings_of_run(known)[0]).get("trainer", {})
    limits = content.get("run_length", {})
    assert length == {key: limit for key, limit in limits.items() if limit not in (None, -1)}


def test_the_file_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    file = saved(tmp_path)
    before = file.read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    inside = folder / "model.safetensors"
    inside.write_bytes(before)
    for given, output in ((file, str(file)), (inside, f"{folder}/")):
        with pytest.raises(GpdError, match=r"would replace .*--ckpt_path; choose"):
            extract_command(given, output)
        assert given.read_bytes() == before
    weights = tmp_path / "student.safetensors"
    extract_command(file, str(weights))
    before = weights.read_bytes()
    given = {"student": "resnet18", "student_weights": str(weights), "student_args": ARGUMENTS}
    for written in ({"output": weights}, {"output": None, "plan": weights}):
        with pytest.raises(GpdError, match=r"would replace .*--model\.student_weights"):
            expand_command(**written, **given)
        assert weights.read_bytes() == before
