import argparse
import copy
import json
import os
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gpd_cli.errors import ModelError, WeightsError
from gpd_cli.files import save_tensors
from gpd_cli.models import (
    ModelSpec,
    ReusedClassifier,
    count_classes,
    create_model,
    input_shape,
    load_state_dict,
    load_weights,
)

needs_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")


class Small(nn.Module):
    """A network with batch norm, for which weight files are quick to make."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def randomized(model: nn.Module) -> nn.Module:
    """With no tensor left at a value that a constructor would give."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.fill_(9)
    return model


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- create_model ---


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("mobilenetv3_small_050", lambda: timm.create_model("mobilenetv3_small_050")),
        ("torchvision/mnasnet0_5", lambda: torchvision.models.mnasnet0_5()),
        ("torchvision/squeezenet1_1", lambda: torchvision.models.squeezenet1_1()),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_build_the_libraries_own_networks_and_weights_move_between_them(
    name: str, reference: Any, suffix: str, tmp_path: Path
) -> None:
    theirs = randomized(reference())
    path = tmp_path / f"weights{suffix}"
    torch.save(theirs.state_dict(), path) if suffix == ".pth" else save_file(
        theirs.state_dict(), path
    )
    ours = create_model(name, weights=path)
    assert type(ours) is type(theirs)
    assert_same(ours.state_dict(), theirs.state_dict())

    # And what is saved here loads there, strictly.
    save_tensors(tmp_path / "ours.pth", ours.state_dict())
    fresh = reference()
    fresh.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    assert_same(fresh.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "torchvision/mnasnet0_5"])
def test_num_classes_is_passed_on(name: str) -> None:
    model = create_model(name, num_classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_model_args_go_to_the_constructor() -> None:
    model = create_model("mobilenetv3_small_050", num_classes=3, model_args={"in_chans": 1})
    assert model.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 3)
    model = create_model("torchvision/mnasnet0_5", model_args={"num_classes": 4, "dropout": 0.9})
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.9]
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 96)])
def test_networks_with_auxiliary_heads_have_one_output_and_are_silent(name: str, side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model(f"torchvision/{name}", num_classes=7)
    assert model.train()(torch.zeros(2, 3, side, side)).shape == (2, 7)


def test_published_weights_of_auxiliary_heads_are_left_out(tmp_path: Path) -> None:
    with_heads = randomized(torchvision.models.googlenet(aux_logits=True, init_weights=False))
    torch.save(with_heads.state_dict(), tmp_path / "googlenet.pth")
    model = create_model("torchvision/googlenet", weights=tmp_path / "googlenet.pth")
    kept = {k: v for k, v in with_heads.state_dict().items() if not k.startswith("aux")}
    assert_same(model.state_dict(), kept)
    torch.save({**kept, "other": torch.ones(1)}, tmp_path / "googlenet.pth")
    with pytest.raises(WeightsError, match="unexpected other"):
        create_model("torchvision/googlenet", weights=tmp_path / "googlenet.pth")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnt18", "resnet18"),
        ("timm/resnet18", "resnet18"),
        ("cifar_resnet22", "cifar_resnet20"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("torchvision/ResNet18", "torchvision/resnet18"),
    ],
)
def test_an_unknown_name_is_told_with_close_ones(name: str, meant: str) -> None:
    with pytest.raises(ModelError) as error:
        create_model(name)
    message = str(error.value)
    assert message.startswith(f"Unknown model '{name}' (did you mean ")
    assert meant in message.partition("?")[0].replace("mean", "or").split(" or ")
    assert "timm.list_models()" in message


class GatedLast(nn.Module):
    """A network that registers a layer behind its classifier, which runs last."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, num_classes)
        self.gate = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.stem(images).mean((2, 3))
        return self.fc(pooled * self.gate(pooled).sigmoid())


def test_simkd_replaces_the_classifier_and_not_the_last_layer_registered() -> None:
    network = ReusedClassifier(GatedLast(), 8, 5)
    assert network.replaced == "fc" and isinstance(network.body.gate, nn.Linear)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    two = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    with pytest.raises(ModelError, match=r"no single linear classifier.*another student for simkd"):
        ReusedClassifier(two, 8, 5)


def test_weights_of_another_activation_are_not_published_ones() -> None:
    with pytest.raises(ModelError, match=r"ReLU6, so choose that network"):
        create_model("mobilenetv1_relu", model_args={"pretrained": True})


def test_a_mistyped_name_with_a_tag_is_not_taken_for_an_import_path() -> None:
    with pytest.raises(ModelError, match=r"did you mean resnet18 .*its module 'resnet180' must be"):
        create_model("resnet180.a1_in1k")


def test_a_network_of_a_program_is_found_though_the_program_is_no_installed_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "GatedLast", GatedLast, raising=False)
    assert isinstance(create_model("__main__.GatedLast"), GatedLast)


@pytest.mark.parametrize("name", ["", "zzzzzzzz", "torchvision/fasterrcnn_resnet50_fpn"])
def test_names_of_no_classifier_are_unknown(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^Unknown model '{name}'.*timm\.list_models\(\)"):
        create_model(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet18",
            {"model_args": {"foo": 1}},
            "Cannot build resnet18(foo=1): ResNet.__init__() got an unexpected keyword argument "
            "'foo'.",
        ),
        (
            "torchvision/resnet18",
            {"model_args": {"foo": 1}},
            "Cannot build torchvision/resnet18(foo=1): ResNet.__init__() got an unexpected keyword "
            "argument 'foo'.",
        ),
        ("resnet18.none", {}, "Cannot build resnet18.none(): Invalid pretrained tag (none)"),
        (
            "resnet18",
            {"num_classes": 0},
            "num_classes of resnet18 must be a whole number of 1 or more, not 0",
        ),
        ("resnet18", {"model_args": {"num_classes": "x"}}, "num_classes of resnet18 must be "),
        (
            "resnet18",
            {"num_classes": 3, "model_args": {"num_classes": 4}},
            "num_classes of resnet18 is 3, but its model arguments say 4; leave out one of the two",
        ),
        (
            "resnet18",
            {"model_args": {"checkpoint_path": "a.pth"}},
            "'checkpoint_path' cannot be a model argument of resnet18; give the file as the "
            "model's weights instead",
        ),
        (
            "torchvision/resnet18",
            {"model_args": {"weights": "DEFAULT"}, "weights": "a.pth"},
            "torchvision/resnet18 cannot start from 'a.pth' and from published weights (in its "
            "model arguments) at once",
        ),
        ("hf-hub:timm/resnet18.a1_in1k", {}, "'hf-hub:timm/resnet18.a1_in1k' is the address of"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as error:
        create_model(name, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# --- input_shape, count_classes ---


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("resnet18", {}, (3, 224, 224)),
        ("mobilenetv3_small_050", {"in_chans": 1}, (1, 224, 224)),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}, (3, 64, 64)),
        ("vit_tiny_patch16_224", {"img_size": [32, 64], "in_chans": 2, "depth": 1}, (2, 32, 64)),
        ("tresnet_m", {}, (3, 224, 224)),  # its first convolution takes 48 channels
        ("cifar_resnet8", {}, (3, 32, 32)),
        ("cifar_resnet8", {"in_chans": 1}, (1, 32, 32)),
        ("torchvision/mnasnet0_5", {}, (3, 224, 224)),
        ("torchvision/inception_v3", {}, (3, 299, 299)),
        ("torchvision/vit_b_16", {"image_size": 32}, (3, 32, 32)),
    ],
)
def test_input_shape(name: str, args: dict[str, Any], shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = create_model(name, model_args=args)
    assert input_shape(model, name, args) == shape


def test_a_users_network_without_configuration_tells_its_channels() -> None:
    @timm.models.register_model
    def gpd_test_thirteen_bands(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(13, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    model = create_model("gpd_test_thirteen_bands")
    shape = input_shape(model, "gpd_test_thirteen_bands")
    assert shape == (13, 224, 224)
    assert count_classes(model, shape) == 6


@pytest.mark.parametrize(
    ("name", "classes"),
    [("cifar_resnet8", 100), ("mobilenetv3_small_050", 1000), ("torchvision/mnasnet0_5", 1000)],
)
def test_count_classes(name: str, classes: int) -> None:
    for given, expected in ((None, classes), (12, 12)):
        model = create_model(name, num_classes=given)
        assert count_classes(model, (3, 32, 32)) == expected


def test_counting_classes_leaves_the_network_as_it_was() -> None:
    model = Small(6).double().train()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    assert count_classes(model, (3, 8, 8)) == 6
    assert_same(model.state_dict(), before)
    assert model.training
    assert model.conv.training
    assert not model.bn.training


def test_networks_that_are_no_classifiers_are_told_in_a_sentence() -> None:
    for model, message in [
        (nn.Conv2d(3, 4, 3), "Conv2d is not an image classifier: .* but is shape \\[2, 4, 6, 6\\]"),
        (
            create_model("mobilenetv3_small_050", model_args={"features_only": True}),
            "not an image classifier: .* but is list",
        ),
        (nn.Linear(5, 2), "Linear cannot take images of shape \\[3, 8, 8\\]: .*mat1"),
    ]:
        with pytest.raises(ModelError, match=message) as error:
            count_classes(model, (3, 8, 8))
        assert "\n" not in str(error.value)
    headless = timm.create_model("cifar_resnet8", num_classes=0)
    with pytest.raises(ModelError, match="CifarResNet has no classifier; set num_classes"):
        count_classes(headless, (3, 32, 32))


# --- ModelSpec ---


def test_a_spec_survives_json_and_builds_the_same_network(tmp_path: Path) -> None:
    spec = ModelSpec("vit_tiny_patch16_224", None, {"img_size": (32, 32), "depth": 1})
    model = randomized(spec.build())
    resolved = spec.resolve(model)
    assert resolved.num_classes == 1000
    assert spec.num_classes is None

    read = ModelSpec.from_dict(json.loads(json.dumps(resolved.to_dict())))
    assert read == resolved
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    again = read.build(weights=tmp_path / "vit.pth")
    assert_same(again.state_dict(), model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_spec_does_not_change_with_the_arguments_it_was_made_from() -> None:
    args = {"block": [1]}
    spec = ModelSpec("resnet18", 10, args)
    args["block"].append(2)
    spec.to_dict()["model_args"]["block"].append(3)
    assert spec.model_args == {"block": [1]}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": 3},
        {"name": "resnet18", "num_classes": "ten"},
        {"name": "resnet18", "colour": "blue"},
        ["resnet18"],
    ],
)
def test_what_is_no_spec_is_told_in_a_sentence(values: Any) -> None:
    with pytest.raises(ModelError, match=r"^The description of a model is not valid.*\.$"):
        ModelSpec.from_dict(values)


@pytest.mark.parametrize("value", [nn.ReLU, object(), float("nan"), {1, 2}])
def test_arguments_that_json_cannot_hold_are_told_in_a_sentence(value: Any) -> None:
    with pytest.raises(ModelError, match=r"^The model arguments of resnet18 must be numbers"):
        ModelSpec("resnet18", None, {"act_layer": value})


# --- the CIFAR ResNets ---


def literature_count(depth: int, widths: tuple[int, ...], classes: int) -> int:
    """Parameters by the formula: convolutions, batch norms, projections, classifier."""
    stem, *stages = widths
    count = 3 * 9 * stem + 2 * stem
    narrow = stem
    for stage, wide in enumerate(stages):
        for block in range((depth - 2) // 6):
            count += 9 * narrow * wide + 9 * wide * wide + 2 * 2 * wide
            if block == 0 and (stage > 0 or narrow != wide):
                count += narrow * wide + 2 * wide
            narrow = wide
    return count + narrow * classes + classes


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)


@pytest.mark.parametrize(
    ("name", "depth", "widths", "published"),
    [
        ("cifar_resnet8", 8, NARROW, 83_892),
        ("cifar_resnet14", 14, NARROW, None),
        ("cifar_resnet20", 20, NARROW, 278_324),
        ("cifar_resnet32", 32, NARROW, 472_756),
        ("cifar_resnet44", 44, NARROW, None),
        ("cifar_resnet56", 56, NARROW, 861_620),
        ("cifar_resnet110", 110, NARROW, 1_736_564),
        ("cifar_resnet8x4", 8, WIDE, 1_233_540),
        ("cifar_resnet32x4", 32, WIDE, 7_433_860),
    ],
)
def test_cifar_resnets_have_the_literatures_size(
    name: str, depth: int, widths: tuple[int, ...], published: int | None
) -> None:
    model = create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == literature_count(depth, widths, classes=100)
    assert published in (None, count)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    projections = [m for m in weighted if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(projections) == depth
    assert len(projections) == (2 if widths[0] == widths[1] else 3)


def test_cifar_resnets_halve_the_image_twice() -> None:
    model = create_model("cifar_resnet8x4", num_classes=10, model_args={"in_chans": 1}).eval()
    x = torch.randn(2, 1, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 256, 8, 8)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert model(x).shape == (2, 10)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))


def test_cifar_resnets_are_timm_models_of_their_own() -> None:
    names = timm.list_models("cifar_resnet*")
    assert len(names) == 10
    model = timm.create_model("cifar_resnet20", pretrained=False, num_classes=10)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["architecture"] == "cifar_resnet20"
    model.reset_classifier(4)
    assert model.num_classes == 4
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_a_shortcut_passes_what_the_convolutions_do_not() -> None:
    model = create_model("cifar_resnet8").eval()
    block = model.layer1[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(block(x), x.relu())


def test_a_depth_that_is_not_6n_plus_2_is_told() -> None:
    from gpd_cli.models.cifar_resnet import CifarResNet

    with pytest.raises(ValueError, match="depth must be 8, 14, 20 or another 6n"):
        CifarResNet(9)


# --- reading weight files ---


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".PTH"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_suffix_and_both_torch_formats_are_read(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    state = randomized(Small()).state_dict()
    torch.save(state, tmp_path / f"x{suffix}", _use_new_zipfile_serialization=zipped)
    assert_same(load_state_dict(tmp_path / f"x{suffix}"), state)


def test_safetensors_are_read(tmp_path: Path) -> None:
    state = randomized(Small()).state_dict()
    save_file(state, tmp_path / "x.safetensors")
    assert_same(load_state_dict(str(tmp_path / "x.safetensors")), state)


@pytest.mark.parametrize(
    "wrapper",
    [
        "state_dict_ema",
        "model_ema",
        "state_dict",
        "model",
        "model_state_dict",
        "model_state",
        "net",
    ],
)
def test_wrapped_state_dicts_are_found(tmp_path: Path, wrapper: str) -> None:
    state = randomized(Small()).state_dict()
    extra = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    torch.save({**extra, wrapper: state}, tmp_path / "x.pth")
    assert_same(load_state_dict(tmp_path / "x.pth"), state)
    torch.save({"model": {**extra, wrapper: state}}, tmp_path / "x.pth")
    assert_same(load_state_dict(tmp_path / "x.pth"), state)


def test_averaged_weights_are_preferred_and_empty_ones_passed_over(tmp_path: Path) -> None:
    raw, averaged = randomized(Small()).state_dict(), randomized(Small()).state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "x.pth")
    assert_same(load_state_dict(tmp_path / "x.pth"), averaged)
    torch.save({"model": raw, "state_dict_ema": None}, tmp_path / "x.pth")
    assert_same(load_state_dict(tmp_path / "x.pth"), raw)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_go_where_every_key_has_them(tmp_path: Path, prefix: str) -> None:
    state = randomized(Small()).state_dict()
    prefixed = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "x.pth")
    assert_same(load_state_dict(tmp_path / "x.pth"), state)
    model = Small()
    load_weights(model, tmp_path / "x.pth")
    assert_same(model.state_dict(), state)

    mixed = {**prefixed, "head.weight": torch.ones(1)}
    torch.save(mixed, tmp_path / "x.pth")
    assert load_state_dict(tmp_path / "x.pth").keys() == mixed.keys()


def test_the_average_that_torch_keeps_is_read(tmp_path: Path) -> None:
    model = randomized(Small())
    torch.save({"model_ema": AveragedModel(model).state_dict()}, tmp_path / "x.pth")
    assert_same(load_state_dict(tmp_path / "x.pth"), model.state_dict())


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(model=randomized(Small())))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    again = nn.Sequential(OrderedDict(model=Small()))
    load_weights(again, tmp_path / "x.pth")
    assert_same(again.state_dict(), model.state_dict())


def test_files_from_before_the_batch_counter_load(tmp_path: Path) -> None:
    state = randomized(Small()).state_dict()
    del state["bn.num_batches_tracked"]  # with the metadata of today
    torch.save(state, tmp_path / "x.pth")
    model = Small()
    load_weights(model, tmp_path / "x.pth")
    assert_same({k: model.state_dict()[k] for k in state}, state)


def test_torchvisions_own_older_names_load(tmp_path: Path) -> None:
    def vit() -> nn.Module:
        return torchvision.models.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)

    def densenet() -> nn.Module:
        return torchvision.models.DenseNet(4, (1, 1), 8, num_classes=3)

    for build, old in [
        (vit, {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}),
        (densenet, {f"{n}{i}.": f"{n}.{i}." for n in ("norm", "conv") for i in (1, 2)}),
    ]:
        theirs = randomized(build()).state_dict()
        renamed = {}
        for key, tensor in theirs.items():
            if "layer" in key:
                for new_name, old_name in old.items():
                    key = key.replace(new_name, old_name)
            renamed[key] = tensor
        assert renamed.keys() != theirs.keys()
        torch.save(renamed, tmp_path / "x.pth")
        model = build()
        load_weights(model, tmp_path / "x.pth")
        assert_same(model.state_dict(), theirs)


def test_half_precision_files_load_into_single_precision(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in Small().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    model = Small()
    load_weights(model, tmp_path / "x.pth")
    assert model.conv.weight.dtype == torch.float32
    assert torch.equal(model.conv.weight, state["conv.weight"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: [s.pop(k) for k in list(s)[:4]],
            "missing conv.weight, conv.bias, bn.weight and 1 more; is it for",
        ),
        (lambda s: s.update({"a.b": torch.ones(1)}), "does not fit Small: unexpected a.b; is it"),
        (
            lambda s: s.update({"fc.weight": torch.ones(7, 4), "fc.bias": torch.ones(7)}),
            "does not fit Small: shaped fc.weight 7x4 instead of 5x4, fc.bias 7 instead of 5; "
            "is it for another architecture or class count, or from a network with other "
            "constructor arguments (--model.student_args, --model.static_teacher.args, args in "
            "--model.assistants)?",
        ),
        (
            lambda s: (
                s.pop("fc.bias"),
                s.update(
                    {
                        "fc.b": torch.ones(5),
                        "bn.bias": torch.ones(()),
                    }
                ),
            ),
            "missing fc.bias; unexpected fc.b; shaped bn.bias scalar instead of 4; is it",
        ),
    ],
)
def test_a_misfit_names_the_keys_and_changes_nothing(
    tmp_path: Path, change: Any, message: str
) -> None:
    state = dict(randomized(Small()).state_dict())
    change(state)
    path = tmp_path / "x.pth"
    torch.save(state, path)
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError) as error:
        load_weights(model, path)
    assert str(error.value).startswith(f"'{path}' does not fit Small: ")
    assert message in str(error.value)
    assert_same(model.state_dict(), before)


def test_a_misfit_calls_the_network_by_its_name(tmp_path: Path) -> None:
    torch.save(create_model("cifar_resnet8").state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"does not fit cifar_resnet14: missing layer1.1.conv1"):
        create_model("cifar_resnet14", weights=tmp_path / "x.pth")


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "x.pth", tmp_path / "ran"
    for content in (Small(), {"state_dict": Small().state_dict(), "code": Marker(ran)}):
        torch.save(content, path)
        with pytest.raises(WeightsError) as error:
            load_state_dict(path)
        assert str(error.value).startswith(f"'{path}' contains a Python object (")
        assert str(error.value).endswith("with torch.save(model.state_dict(), path).")
        assert "\n" not in str(error.value)
    assert not ran.exists()


def whole_file(tmp_path: Path, suffix: str) -> bytes:
    state = nn.Linear(100, 100).state_dict()
    save_tensors(tmp_path / f"whole{suffix}", state)
    return (tmp_path / f"whole{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "half", "head", "page"])
def test_damaged_files_are_told_in_a_sentence(tmp_path: Path, suffix: str, damage: str) -> None:
    whole = whole_file(tmp_path, suffix)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(
        {
            "empty": b"",
            "garbage": bytes(range(256)) * 20,
            "half": whole[: len(whole) // 2],
            "head": whole[:40],
            "page": b"<!DOCTYPE html><html>Not found</html>",
        }[damage]
    )
    with pytest.raises(WeightsError) as error:
        load_state_dict(path)
    assert str(error.value) == (
        f"'{path}' is damaged or not a weight file; download or copy it again."
    )


def test_paths_that_are_no_weight_file_are_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.npz").touch()
    (tmp_path / "plain").touch()
    for path, message in {
        tmp_path / "gone.pth": f"There is no weight file '{tmp_path}/gone.pth'; check the path.",
        tmp_path: f"'{tmp_path}' is a folder; name the weight file in it.",
        tmp_path / "x.npz": f"Cannot read '{tmp_path}/x.npz': its suffix must be one of .pth, "
        ".pt, .bin, .ckpt, .tar, .safetensors.",
        tmp_path / "plain": f"Cannot read '{tmp_path}/plain': its suffix must be one of .pth",
        tmp_path / "plain" / "x.pth": f"There is no weight file '{tmp_path}/plain/x.pth'",
    }.items():
        with pytest.raises(WeightsError) as error:
            load_state_dict(path)
        assert str(error.value).startswith(message)


@needs_user
def test_a_file_without_permission_is_told_in_a_sentence(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).touch(mode=0o000)
        with pytest.raises(WeightsError, match=r"Cannot read '.*': Permission denied.*; check the"):
            load_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a Tensor"),
        ({}, "nothing"),
        ({"state_dict": {}}, "nothing"),
        ({"epoch": 1, "lr": 2, "w": torch.ones(1)}, "entries such as epoch, lr"),
    ],
)
def test_files_without_state_dict_are_told_in_a_sentence(
    tmp_path: Path, content: Any, found: str
) -> None:
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError) as error:
        load_state_dict(path)
    assert str(error.value) == (
        f"There is no state dict in '{path}', which contains {found}; "
        "save one with torch.save(model.state_dict(), path)."
    )


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_told_in_a_sentence(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "x.pt"))
    with pytest.raises(WeightsError, match="is a TorchScript archive; save the state dict alone"):
        load_state_dict(tmp_path / "x.pt")


# MobileNet V1 of the paper's authors


def test_mobilenet_v1_has_relu_and_pytorchs_initialization() -> None:
    torch.manual_seed(0)
    model = create_model("mobilenetv1_relu", num_classes=10)
    assert any(isinstance(module, nn.ReLU) for module in model.modules())
    assert not any(isinstance(module, nn.ReLU6) for module in model.modules())
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 28
    for layer in layers:
        fan_in = layer.weight[0].numel()
        deviation = (1 / (3 * fan_in)) ** 0.5  # of PyTorch's, uniform up to 1 / sqrt(fan_in)
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.1)
        assert layer.weight.abs().max() <= fan_in**-0.5


def test_mobilenet_v1_takes_timms_files() -> None:
    model, theirs = (create_model(name) for name in ("mobilenetv1_relu", "mobilenetv1_100"))
    assert model.load_state_dict(theirs.state_dict(), strict=True)
    assert input_shape(model, "mobilenetv1_relu") == (3, 224, 224)
