"""Files that timm takes as pretrained weights start a student, and nothing else does."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from gpd_cli.commands.expand import expand_command
from gpd_cli.distill.static_teacher import StaticTeacherSettings, load_static_teachers
from gpd_cli.errors import ModelError, TrainingError, WeightsError
from gpd_cli.models import ModelSpec, create_model, load_weights, without_pretrained

RESNET = ("resnet18", {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 16]})
VIT = ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 16, "num_heads": 2})
SWIN = ("swin_tiny_patch4_window7_224", {"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 2]})
State = dict[str, Tensor]


def published(name: str, args: dict[str, Any], classes: int = 7) -> State:
    """Weights that no constructor would give."""
    state = timm.create_model(name, num_classes=classes, **args).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
        for key, t in state.items()
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "published.pth"


def old_swin(state: State) -> State:
    state = dict(state)
    for key in list(state):
        if key.endswith("relative_position_bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return state


def original_convnext(state: State) -> State:
    """The names of ConvNeXt's authors."""
    renamed = {}
    for key, tensor in state.items():
        for new, old in (
            ("stem.", "downsample_layers.0."),
            ("blocks.", ""),
            ("conv_dw.", "dwconv."),
            ("mlp.fc1.", "pwconv1."),
            ("mlp.fc2.", "pwconv2."),
            ("head.norm.", "norm."),
            ("head.fc.", "head."),
        ):
            key = key.replace(new, old)
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = f"downsample_layers.{stage}.{key.partition('.downsample.')[2]}"
        renamed[key] = tensor
    return renamed


CONVNEXT = ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8], "conv_mlp": False})


@pytest.mark.parametrize(
    ("network", "state", "args", "said"),
    [
        (
            RESNET,
            None,
            {"num_classes": 3},
            "(fc) is initialized anew, since the file has 7 classes and not 3",
        ),
        (
            VIT,
            None,
            {"num_classes": 3},
            "(head) is initialized anew, since the file has 7 classes and not 3",
        ),
        (VIT, None, {"num_classes": 7, "img_size": 96}, "resampled for this image size: pos_embed"),
        (RESNET, None, {"num_classes": 7, "in_chans": 1}, "from 3 input channels to 1"),
        (RESNET, None, {"num_classes": 7, "in_chans": 4}, "from 3 input channels to 4"),
        (SWIN, old_swin, {"num_classes": 7}, None),
        (CONVNEXT, original_convnext, {"num_classes": 7}, None),
        (
            (VIT[0], VIT[1]),
            None,
            {"num_classes": 3, "img_size": 64, "in_chans": 1},
            "patch_embed.proj is adapted from 3 input channels to 1",
        ),
    ],
)
def test_weights_are_adapted_as_timm_adapts_them(
    file: Path,
    caplog: pytest.LogCaptureFixture,
    network: tuple[str, dict[str, Any]],
    state: Any,
    args: dict[str, Any],
    said: str | None,
) -> None:
    name, own = network
    tensors = published(name, own)
    torch.save(tensors if state is None else state(tensors), file)
    overlay = {"file": str(file), "num_classes": 7}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **own, **args
    ).state_dict()
    classes = args["num_classes"]
    further = {key: value for key, value in args.items() if key != "num_classes"}
    ours = ModelSpec(name, classes, {**own, **further}).build(file).state_dict()
    classifier = ("fc.", "head.") if classes != 7 else ()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if not key.startswith(classifier):
            assert torch.equal(tensor, theirs[key]), key
    if said is None:
        assert not caplog.messages
    else:
        assert said in caplog.text


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_files_that_were_converted_as_a_whole_are_taken(file: Path, dtype: torch.dtype) -> None:
    """With ``{key: tensor.half()}``, or averaged, which makes fractions of counters, too."""
    name, args = RESNET
    state = published(name, args)
    state["bn1.num_batches_tracked"] = torch.tensor(100_000)  # infinite in float16
    torch.save({key: tensor.to(dtype) for key, tensor in state.items()}, file)
    network = ModelSpec(name, 7, args).build(file)
    rounded = state["conv1.weight"].to(dtype).float()
    assert torch.equal(network.get_parameter("conv1.weight"), rounded)
    assert network.bn1.num_batches_tracked.dtype == torch.int64
    assert network.bn1.num_batches_tracked >= 0


def test_colour_weights_come_from_grey_ones(file: Path) -> None:
    name, args = RESNET
    torch.save(published(name, {**args, "in_chans": 1}), file)
    weight = ModelSpec(name, 7, args).build(file).get_parameter("conv1.weight")
    grey = torch.load(file)["conv1.weight"]
    torch.testing.assert_close(weight.sum(dim=1, keepdim=True), grey)


def test_torchvisions_transformers_are_resampled_by_its_own_function(file: Path) -> None:
    options: dict[str, Any] = {
        "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16,
    }  # fmt: skip
    big = torchvision.models.VisionTransformer(image_size=64, num_classes=3, **options)
    model = torchvision.models.VisionTransformer(image_size=32, num_classes=3, **options)
    torch.nn.init.normal_(big.encoder.pos_embedding)
    expected = torchvision.models.vision_transformer.interpolate_embeddings(
        32, 16, copy.deepcopy(big.state_dict())
    )
    torch.save(big.state_dict(), file)
    notes = load_weights(model, file)
    assert torch.equal(model.encoder.pos_embedding, expected["encoder.pos_embedding"])
    assert notes == ("resampled for this image size: encoder.pos_embedding",)


def beneath(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


LOSS = {"criterion.weight": torch.ones(7)}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"state_dict": beneath("net.", s)}, "those under 'net.'"),
        (lambda s: {"state_dict": beneath("model.", s) | LOSS}, "network: criterion.weight"),
        (lambda s: s | LOSS, "left in the file, beside the network: criterion.weight"),
        (lambda s: beneath("backbone.", s), "those under 'backbone.'"),
        (lambda s: beneath("task.module.encoder.", s), "those under 'task.module.encoder.'"),
        (
            lambda s: (
                beneath("student.", s) | beneath("teacher.", {k: t + 1 for k, t in s.items()})
            ),
            "those under 'student.'",
        ),
        (lambda s: beneath("a.", s) | beneath("b.", s), "those under 'a.'"),
    ],
)
def test_a_prefix_under_which_everything_fits_is_found(
    file: Path, caplog: pytest.LogCaptureFixture, wrap: Any, said: str
) -> None:
    name, args = RESNET
    state = published(name, args)
    torch.save(wrap(state), file)
    model = ModelSpec(name, 7, args).build(file)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert said in caplog.text


def test_a_network_without_classifier_gets_a_new_one(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, args = RESNET
    state = published(name, args)
    torch.save({k: t for k, t in beneath("backbone.", state).items() if ".fc." not in k}, file)
    model = ModelSpec(name, 3, args).build(file)
    assert torch.equal(model.get_parameter("conv1.weight"), state["conv1.weight"])
    assert "the classifier (fc) is initialized anew, since the file has none" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: {k: t for k, t in s.items() if "layer3" not in k}, "missing layer3.0.conv1"),
        (
            lambda s: s | {"layer1.1.conv1.weight": torch.ones(1)},
            "unexpected layer1.1.conv1.weight",
        ),
        (lambda s: s | {"norm_pre.weight": torch.ones(4)}, "unexpected norm_pre.weight"),
        (lambda s: s | {"fc.weight": torch.ones(5, 9)}, "shaped fc.weight 5x9 instead of 3x16"),
        (lambda s: s | {"conv1.weight": torch.ones(4, 3, 3, 3)}, "shaped conv1.weight 4x3x3x3"),
        (lambda s: {k: t for k, t in s.items() if k != "fc.bias"}, "missing fc.bias"),
        (
            lambda s: beneath("a.", s) | beneath("b.", {k: t + 1 for k, t in s.items()}),
            r"it contains several networks, under 'a\.', 'b\.'; save the state dict of one network",
        ),
    ],
)
def test_a_mismatch_elsewhere_stays_an_error(file: Path, change: Any, named: str) -> None:
    name, args = RESNET
    torch.save(change(published(name, args)), file)
    with pytest.raises(WeightsError, match=named):
        ModelSpec(name, 3, args).build(file)


def test_of_several_networks_the_student_is_that_of_this_very_name(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, args = RESNET
    state = published(name, args)
    others = {k: t + 1 for k, t in state.items()}
    torch.save(beneath("old_student.", others) | beneath("student.", state), file)
    model = ModelSpec(name, 3, args).build(file)
    assert torch.equal(model.get_parameter("conv1.weight"), state["conv1.weight"])
    assert "the weights are those under 'student.'" in caplog.text


def test_where_no_number_of_classes_was_asked_for_the_files_is_named_and_loads(file: Path) -> None:
    name, args = RESNET
    state = published(name, args)
    torch.save(state, file)
    with pytest.raises(WeightsError, match=r"set --model\.num_classes to 7 for its classifier"):
        ModelSpec(name, None, args).build(file)
    model = ModelSpec(name, 7, args).build(file)  # as it says
    assert torch.equal(model.get_parameter("fc.weight"), state["fc.weight"])


def test_a_teacher_is_given_no_new_classifier(file: Path) -> None:
    name, args = RESNET
    torch.save(published(name, args), file)
    with pytest.raises(WeightsError, match=r"shaped fc\.weight 7x16 instead of 3x16"):
        ModelSpec(name, 3, args).build(file, role="teacher")


def test_of_a_file_with_both_networks_each_takes_its_own(file: Path) -> None:
    name, args = RESNET
    state = published(name, args)
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save(beneath("student.", state) | beneath("teacher.", other), file)
    spec = ModelSpec(name, 7, args)
    student, teacher = spec.build(file), spec.build(file, role="teacher")
    assert torch.equal(student.get_parameter("fc.bias"), state["fc.bias"])
    assert torch.equal(teacher.get_parameter("fc.bias"), other["fc.bias"])


def test_published_weights_are_loaded_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As from the hub: the configuration of timm names a file instead."""
    name, args = RESNET
    state = published(name, args)
    torch.save(state, file)
    overlay = {"file": str(file), "num_classes": 7}
    spec = ModelSpec(name, 3, {**args, "pretrained": True, "pretrained_cfg_overlay": overlay})
    model = spec.build()
    assert torch.equal(model.get_parameter("conv1.weight"), state["conv1.weight"])
    assert (
        "the classifier is initialized anew, since the published weights have 7 classes"
        in caplog.text
    )
    kept = spec.resolve(model)
    assert "pretrained" not in kept.model_args
    file.unlink()
    kept.build()  # a checkpoint has weights of its own
    with pytest.raises(ModelError, match=r"cannot be loaded .*give a copy of the file"):
        spec.build()


def test_published_weights_for_other_classes_make_no_teacher(file: Path) -> None:
    name, args = RESNET
    torch.save(published(name, args), file)
    overlay = {"file": str(file), "num_classes": 7}
    further = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    with pytest.raises(WeightsError, match=r"are for 7 classes and not 3"):
        create_model(name, num_classes=3, model_args={**args, **further}, role="teacher")


def publish(monkeypatch: pytest.MonkeyPatch, name: str, **args: Any) -> State:
    """Let torchvision publish weights of a network without a download."""
    entries = torchvision.models.get_model_weights(name)
    state = torchvision.models.get_model(name, weights=None, **args).state_dict()
    monkeypatch.setattr(entries, "get_state_dict", lambda *_, **__: state)
    return state


@pytest.mark.parametrize("asked", [{"pretrained": True}, {"weights": "IMAGENET1K_V1"}])
def test_published_weights_see_the_images_as_torchvision_shows_them(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """GoogLeNet's and Inception's weights are for images of another mean, which they change to."""
    publish(monkeypatch, "googlenet", init_weights=False, aux_logits=True)
    theirs = torchvision.models.googlenet(weights="DEFAULT").eval()
    spec = ModelSpec("torchvision/googlenet", None, asked)
    network = spec.build().eval()
    resolved = spec.resolve(network)
    again = resolved.build().eval()  # as a checkpoint's
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images), theirs(images))
        assert torch.equal(again(images), theirs(images))
    assert resolved.model_args == without_pretrained(spec.name, spec.model_args)
    plain = ModelSpec("torchvision/googlenet", None, {**asked, "transform_input": False})
    assert plain.resolve(plain.build()).model_args == {"transform_input": False}


def test_a_student_for_simkd_starts_from_torchvisions_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = publish(monkeypatch, "resnet18")
    args = {"features": 8, "pretrained": True}
    student = create_model("simkd/torchvision/resnet18", num_classes=3, model_args=args)
    assert torch.equal(student.get_parameter("body.conv1.weight"), state["conv1.weight"])


def test_a_student_for_simkd_starts_from_a_file_of_its_network(file: Path) -> None:
    name, own = RESNET
    state = published(name, own)
    torch.save(state, file)
    args = {**own, "features": 8}
    student = create_model(f"simkd/{name}", num_classes=3, weights=file, model_args=args)
    for key, tensor in student.body.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, file)
    spread = create_model(f"simkd/{name}", num_classes=3, weights=file, model_args=args)
    assert torch.equal(spread.body.conv1.weight, state["conv1.weight"])
    torch.save(student.state_dict(), file)  # a file of the whole student
    again = create_model(f"simkd/{name}", num_classes=3, weights=file, model_args=args)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[key]), key


def test_channels_of_images_are_not_taken_for_folded_pixels(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, own = RESNET
    torch.save(timm.create_model(name, num_classes=3, in_chans=12, **own).state_dict(), file)
    create_model(name, num_classes=3, weights=file, model_args={**own, "in_chans": 4})
    assert "conv1 is adapted from 12 input channels to 4" in caplog.text


def test_an_entry_of_torchvisions_weights_makes_a_trained_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = publish(monkeypatch, "resnet18")
    settings = StaticTeacherSettings("torchvision/resnet18", args={"weights": "DEFAULT"})
    (teacher,) = load_static_teachers(settings, None, 1000, 3)
    assert torch.equal(teacher.network.get_parameter("fc.bias"), state["fc.bias"])
    given = {"student": "torchvision/resnet18", "student_args": {"weights": "DEFAULT"}}
    with pytest.raises(TrainingError, match=r"published weights; set --model.branch_init zero"):
        expand_command(tmp_path / "wide.safetensors", **given, branch_init="gpd")


def test_a_copy_of_published_weights_needs_the_same_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: Any, **__: Any) -> State:
        raise OSError("no route to host")

    entries = torchvision.models.get_model_weights("googlenet")
    monkeypatch.setattr(entries, "get_state_dict", unreachable)
    arguments = re.escape('with {"transform_input": true} among the network\'s arguments.')
    with pytest.raises(ModelError, match=rf"give a copy of the file .*{arguments}$"):
        create_model("torchvision/googlenet", model_args={"pretrained": True})
