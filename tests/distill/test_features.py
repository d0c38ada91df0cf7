"""Stages and classifiers found in many networks, and the hooks that catch what they compute."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import _gen_efficientnet, _gen_mobilenet_v1
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import gpd_cli.models  # noqa: F401  registers the CIFAR networks
from gpd_cli import expand
from gpd_cli.distill.features import FeatureHooks, FeatureInfo, Outputs, find_features
from gpd_cli.distill.features.stage import ShapeHints
from gpd_cli.distill.methods import Batch, Method
from gpd_cli.distill.methods.attention import AT
from gpd_cli.distill.methods.catkd import CATKD
from gpd_cli.distill.methods.fitnets import FitNets
from gpd_cli.distill.methods.reviewkd import ReviewKD
from gpd_cli.errors import MethodError

Build = Callable[[], nn.Module]

tv = torchvision.models


def by_name(name: str, **options: object) -> Build:
    return lambda: timm.create_model(name, num_classes=10, **options)


LAYERS = ["layer1", "layer2", "layer3", "layer4"]
BLOCKS = ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]

DEFAULTS: dict[str, tuple[Build, int, list[str], list[int], list[int], str, int]] = {
    # name: (network, image side, stages, their channels, their sides, classifier, its inputs)
    "resnet18": (by_name("resnet18"), 64, LAYERS, [64, 128, 256, 512], [16, 8, 4, 2], "fc", 512),
    "resnet18 of small images": (
        by_name("resnet18"),
        *(32, LAYERS, [64, 128, 256, 512], [8, 4, 2, 1], "fc", 512),
    ),
    "mobilenetv1": (
        by_name("mobilenetv1_100"),
        *(64, ["blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
        *([128, 256, 512, 1024], [16, 8, 4, 2], "classifier", 1024),
    ),
    "vit_tiny": (
        by_name("vit_tiny_patch16_224", img_size=64),
        *(64, BLOCKS, [192] * 4, [4] * 4, "head", 192),
    ),
    "vit with registers": (
        # Four patches and five other tokens, which are no map of 3 x 3.
        by_name("vit_small_patch14_reg4_dinov2", img_size=28),
        *(28, BLOCKS, [384] * 4, [2] * 4, "head", 384),
    ),
    "swin_tiny": (
        by_name("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
        *(64, ["layers.0", "layers.1", "layers.2", "layers.3"]),
        *([96, 192, 384, 768], [16, 8, 4, 2], "head.fc", 768),
    ),
    "convnext_atto": (
        by_name("convnext_atto"),
        *(64, ["stages.0", "stages.1", "stages.2", "stages.3"]),
        *([40, 80, 160, 320], [16, 8, 4, 2], "head.fc", 320),
    ),
    "efficientnet_b0": (
        by_name("efficientnet_b0"),
        *(64, ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
        *([24, 40, 112, 320], [16, 8, 4, 2], "classifier", 1280),
    ),
    "mixer": (
        by_name("mixer_s16_224", img_size=64),
        *(64, ["blocks.1", "blocks.3", "blocks.5", "blocks.7"], [512] * 4, [4] * 4, "head", 512),
    ),
    "torchvision resnet18": (
        lambda: tv.resnet18(num_classes=10),
        *(64, LAYERS, [64, 128, 256, 512], [16, 8, 4, 2], "fc", 512),
    ),
    "torchvision vit": (
        lambda: tv.VisionTransformer(64, 16, 6, 4, 32, 64, num_classes=10),
        *(64, [f"encoder.layers.encoder_layer_{k}" for k in (1, 2, 4, 5)]),
        *([32] * 4, [4] * 4, "heads.head", 32),
    ),
    "torchvision swin_t": (
        lambda: tv.swin_t(num_classes=10),
        *(64, ["features.1", "features.3", "features.5", "permute"]),
        *([96, 192, 384, 768], [16, 8, 4, 2], "head", 768),
    ),
    "torchvision mobilenet_v2": (
        lambda: tv.mobilenet_v2(num_classes=10),
        *(64, ["features.3", "features.6", "features.13", "features"]),
        *([24, 32, 96, 1280], [16, 8, 4, 2], "classifier.1", 1280),
    ),
    "torchvision squeezenet1_1": (
        # Its classifier is a convolution, which is no linear layer that sees an embedding.
        lambda: tv.squeezenet1_1(num_classes=10),
        *(64, ["features.1", "features.4", "features.7", "classifier.2"]),
        *([64, 128, 256, 10], [31, 15, 7, 3], "", 0),
    ),
    "cifar_resnet20": (
        by_name("cifar_resnet20"),
        *(32, LAYERS[:3], [16, 32, 64], [32, 16, 8], "fc", 64),
    ),
}

SMALL: dict[str, tuple[Build, int, list[str] | None]] = {
    # Families that dynamic teachers are grown from here: (network, image side, stages)
    "resnet": (
        lambda: ResNet(
            BasicBlock, (1, 1, 1, 1), 10, channels=(8, 16, 24, 32), zero_init_last=False
        ),
        *(64, None),
    ),
    "mobilenetv1": (lambda: _gen_mobilenet_v1("mobilenetv1_100", 0.25, num_classes=10), 64, None),
    "vit": (by_name("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=48), 64, None),
    "swin": (
        by_name(
            "swin_tiny_patch4_window7_224",
            **{"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1)},
        ),
        *(64, None),
    ),
    "convnext": (
        lambda: ConvNeXt(num_classes=10, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
        *(64, None),
    ),
    "efficientnet": (
        lambda: _gen_efficientnet("efficientnet_b0", 0.25, 0.5, num_classes=10),
        *(64, ["blocks.2", "blocks.6", "bn2"]),
    ),
    "mixer": (
        lambda: MlpMixer(num_classes=10, img_size=64, num_blocks=4, embed_dim=32),
        *(64, None),
    ),
    "torchvision vit": (
        lambda: tv.VisionTransformer(64, 16, 4, 4, 32, 64, num_classes=10),
        *(64, None),
    ),
    "torchvision swin": (
        lambda: tv.SwinTransformer(
            [4, 4], 24, [1, 1, 2, 1], [1, 2, 4, 8], [2, 2], stochastic_depth_prob=0, num_classes=10
        ),
        *(64, None),
    ),
    "torchvision mobilenet_v2": (
        lambda: tv.mobilenet_v2(num_classes=10, width_mult=0.25),
        64,
        None,
    ),
    "cifar_resnet8": (by_name("cifar_resnet8"), 32, None),
}


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def small_resnet() -> nn.Module:
    return SMALL["resnet"][0]()


# ---- where to look ----


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_stages_and_classifier(name: str) -> None:
    build, side, stages, channels, sides, classifier, embedding = DEFAULTS[name]
    network = build()
    before = copy.deepcopy(network.state_dict())
    places = find_features(network, (3, side, side))
    assert [stage.name for stage in places.stages] == stages
    assert [stage.channels for stage in places.stages] == channels
    assert [(s.height, s.width) for s in places.stages] == [(side, side) for side in sides]
    assert (places.classifier or "", places.embedding) == (classifier, embedding)
    # The network is as it was.
    assert all(module.training for module in network.modules()) and hooks(network) == 0
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_averaged_heads_are_no_classifier() -> None:
    build = by_name("deit_tiny_distilled_patch16_224", img_size=32, depth=2)
    assert find_features(build(), (3, 32, 32)).classifier is None


def test_wrapped_networks_are_looked_into() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    network = Wrapper(Wrapper(Wrapper(tv.resnet18(num_classes=10))))
    places = find_features(network, (3, 64, 64))
    assert [stage.name for stage in places.stages] == [f"inner.inner.inner.{n}" for n in LAYERS]
    assert places.classifier == "inner.inner.inner.fc"


def test_modules_beside_each_other_have_stages_too() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 4, 3, 1, 1)
            self.narrow = nn.Conv2d(4, 8, 3, 2, 1)
            self.fc = nn.Linear(8, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(self.narrow(self.wide(images).relu()).relu().mean((2, 3)))

    stages = find_features(Flat(), (3, 16, 16)).stages
    assert [(stage.name, stage.height) for stage in stages] == [("wide", 16), ("narrow", 8)]


def test_tokens_in_another_order_than_row_by_row_are_no_maps() -> None:
    """Hiera keeps the tokens of a unit together until it has pooled them."""
    network = timm.create_model(
        "hiera_tiny_224", img_size=(64, 64), stages=(1, 1, 1, 1), embed_dim=8, num_heads=1
    )
    with pytest.raises(MethodError, match=r"Hiera keeps its tokens in another order.*such as DKD"):
        find_features(network, (3, 64, 64))
    with pytest.raises(MethodError, match=r"Module 'blocks\.0' of Hiera"):
        find_features(network, (3, 64, 64), names=["blocks.0"])
    assert find_features(network, (3, 64, 64), names=[]).stages == ()  # as for logits


def test_larger_maps_after_smaller_ones_are_no_stages() -> None:
    # VGG enlarges small maps to 7 x 7 before its classifier.
    features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1))
    pool = nn.AdaptiveAvgPool2d(12)
    network = nn.Sequential(features, pool, nn.Flatten(), nn.Linear(8 * 144, 10))
    assert [s.height for s in find_features(network, (3, 32, 32)).stages] == [16, 8]


@pytest.mark.parametrize("name", ["nowhere", "layer1.7", ""])
def test_unknown_modules_are_named(name: str) -> None:
    with pytest.raises(MethodError, match=f"ResNet has no module '{name}' .*conv1, bn1, .*layer4"):
        find_features(small_resnet(), (3, 64, 64), names=["layer1", name])


@pytest.mark.parametrize(
    ("name", "got"),
    [("fc", r"shape \[2, 10\]"), ("layer1.0.downsample", "nothing for each image")],
)
def test_modules_without_feature_maps_are_refused(name: str, got: str) -> None:
    network = small_resnet()
    network.layer1[0].downsample = nn.Identity()  # made, but not run below
    network.layer1[0].forward = lambda x: network.layer1[0].bn1(network.layer1[0].conv1(x))
    with pytest.raises(MethodError, match=f"Module '{name}' of ResNet gives .*{got}"):
        find_features(network, (3, 64, 64), names=[name])


def test_window_partitions_are_refused() -> None:
    build, side, _ = SMALL["swin"]
    with pytest.raises(MethodError, match="nothing for each image"):
        find_features(build(), (3, side, side), names=["layers.0.blocks.0.attn.proj"])


@pytest.mark.parametrize(
    ("hints", "shape", "expected"),
    [
        (ShapeHints((64, 64)), (2, 7, 8, 8), ("map", 7, 8, 8)),
        (ShapeHints((64, 64)), (2, 8, 8, 7), ("map_last", 7, 8, 8)),
        (ShapeHints((64, 64)), (2, 8, 8, 8), ("map", 8, 8, 8)),
        (ShapeHints((64, 64), channels_last=True), (2, 8, 8, 8), ("map_last", 8, 8, 8)),
        (ShapeHints((64, 64), channels_last=True), (2, 9, 8, 8), ("map", 9, 8, 8)),
        (ShapeHints((64, 32)), (2, 5, 8, 4), ("map", 5, 8, 4)),
        (ShapeHints((64, 32)), (2, 8, 4, 5), ("map_last", 5, 8, 4)),
        (ShapeHints((100, 64)), (2, 5, 7, 4), ("map", 5, 7, 4)),
        (ShapeHints((64, 64)), (2, 17, 5), ("tokens", 5, 4, 4)),
        (ShapeHints((64, 32)), (2, 33, 5), ("tokens", 5, 8, 4)),
        (ShapeHints((64, 96)), (2, 25, 5), ("tokens", 5, 4, 6)),  # and no 5 x 5 without class token
        (ShapeHints((64, 64), extra_tokens=5), (2, 9, 5), ("tokens", 5, 2, 2)),
        (ShapeHints((64, 64), extra_tokens=1), (2, 16, 5), ("tokens", 5, 4, 4)),
        (ShapeHints((64, 64)), (2, 3, 17, 17 * 2), None),  # attention, for one
        (ShapeHints((64, 64)), (2, 480, 5), None),
        (ShapeHints((64, 64)), (2, 5), None),
    ],
)
def test_forms_are_told_by_shape(
    hints: ShapeHints, shape: tuple[int, ...], expected: tuple[str, int, int, int] | None
) -> None:
    stage = hints.stage("here", shape)
    found = None if stage is None else (stage.form, stage.channels, stage.height, stage.width)
    assert found == expected


def test_maps_of_all_forms_are_the_same_map() -> None:
    maps = torch.randn(2, 5, 4, 4)
    hints = ShapeHints((64, 64))
    tokens = torch.cat([torch.randn(2, 1, 5), maps.flatten(2).transpose(1, 2)], dim=1)
    for output in (maps, maps.permute(0, 2, 3, 1), tokens):
        stage = hints.stage("here", tuple(output.shape))
        assert stage is not None
        assert torch.equal(stage.as_map(output), maps)


def test_tokens_of_larger_images_are_a_larger_map() -> None:
    stage = ShapeHints((64, 64), extra_tokens=1).stage("here", (2, 17, 5))
    assert stage is not None and (stage.height, stage.width) == (4, 4)
    maps = torch.randn(2, 5, 6, 6)
    tokens = torch.cat([torch.randn(2, 1, 5), maps.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(stage.as_map(tokens), maps)
    with pytest.raises(MethodError, match="24 tokens, which do not form a map"):
        stage.as_map(torch.randn(2, 24, 5))


def large_resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10, zero_init_last=False)


@pytest.mark.parametrize(
    ("build", "side", "expected"),
    [
        (large_resnet, 64, "layer4"),
        (by_name("mobilenetv1_100"), 64, "bn2"),
        (by_name("cifar_wrn_16_1"), 32, "relu"),  # the last block ends before it
        (by_name("cifar_shufflenetv1"), 32, "layer3"),
        (by_name("cifar_shufflenetv2"), 32, "relu"),
        (lambda: tv.mobilenet_v2(num_classes=10), 64, "features"),
        (by_name("convnext_atto"), 64, None),  # normed after pooling
        (by_name("vit_tiny_patch16_224", img_size=64, depth=2), 64, None),  # a class token
        (large_resnet, 32, None),  # nothing to pool
    ],
)
def test_the_map_that_is_pooled_for_the_classifier(
    build: Build, side: int, expected: str | None
) -> None:
    network, shape = build().eval(), (3, side, side)
    places = find_features(network, shape, pooled=True)
    assert [stage.name for stage in places.stages] == ([] if expected is None else [expected])
    if expected is None:
        return
    caught = FeatureHooks(network, places).take(network(torch.randn(2, *shape)))
    torch.testing.assert_close(caught.stages[0].mean(dim=(2, 3)), caught.embedding)
    assert find_features(network, shape, names=[expected], pooled=True) == places
    first = find_features(network, shape).stages[0].name
    assert find_features(network, shape, names=[first], pooled=True).stages == ()


@pytest.mark.parametrize(
    ("build", "side", "before"),
    [
        (small_resnet, 64, 4),
        (lambda: tv.resnet18(num_classes=10), 64, 4),  # one module for two activations
        (by_name("mobilenetv1_100"), 64, 4),  # inside the norm
        (by_name("cifar_vgg8"), 32, 4),
        (by_name("cifar_shufflenetv1"), 32, 3),
        (by_name("vit_tiny_patch16_224", img_size=64, depth=2), 64, 0),
    ],
)
def test_stages_are_caught_before_their_activation(build: Build, side: int, before: int) -> None:
    network, shape = build().eval(), (3, side, side)
    after = find_features(network, shape)
    places = find_features(network, shape, preactivation=True)
    assert sum(stage.before for stage in places.stages) == before
    taps, others = FeatureHooks(network, places), FeatureHooks(network, after)
    logits = network(torch.randn(2, *shape))
    for stage, given, result in zip(
        places.stages, taps.take(logits).stages, others.take(logits).stages, strict=True
    ):
        if stage.before:
            assert given.min() < 0
            assert torch.equal(given.relu(), result)
        else:
            assert torch.equal(given, result)


@pytest.mark.parametrize(
    ("build", "side", "names", "norms"),
    [
        (
            by_name("cifar_wrn_16_1"),
            *(32, ["block1", "block2", "block3"]),
            ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
        ),
        (  # activations inside the norms
            by_name("resnetv2_50", layers=(1, 1), channels=(8, 16), stem_chs=8),
            *(64, ["stages.0", "stages.1"]),
            ["stages.1.blocks.0.norm1", "norm"],
        ),
    ],
)
def test_stages_of_preactivation_blocks_are_caught_behind_the_next_norm(
    build: Build, side: int, names: list[str], norms: list[str]
) -> None:
    network, shape = build().double().eval(), (3, side, side)
    for name in norms:  # whose statistics are not those of the maps
        nn.init.normal_(network.get_submodule(name).bias)
    places = (
        find_features(network, shape, names=names, preactivation=before) for before in (False, True)
    )
    taps = [FeatureHooks(network, found) for found in places]
    logits = network(torch.randn(2, *shape, dtype=torch.float64))
    for name, end, given in zip(norms, *(t.take(logits).stages for t in taps), strict=True):
        norm = network.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        expected = nn.functional.batch_norm(end, *statistics, eps=norm.eps)
        torch.testing.assert_close(given, expected)
        assert given.min() < 0


def test_a_dynamic_teacher_is_caught_before_its_activations_too() -> None:
    student, shape = small_resnet(), (3, 64, 64)
    pair = expand(student, sample=torch.zeros(2, *shape), ratio=2, branches=2, noise=0.0)
    places = find_features(student, shape, preactivation=True)
    wide = find_features(pair.teacher, shape, like=places)
    taps, wide_taps = FeatureHooks(pair.narrow, places), FeatureHooks(pair.teacher, wide)
    logits, wide_logits = pair(torch.randn(2, *shape))
    ours, theirs = taps.take(logits).stages, wide_taps.take(wide_logits).stages
    assert all(stage.before for stage in wide.stages) and len(wide.stages) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert other.shape[1] == 2 * one.shape[1] and other.min() < 0
        # Copies: the same values, each twice.
        torch.testing.assert_close(
            other.flatten().sort().values[::2], one.flatten().sort().values, rtol=1e-4, atol=1e-4
        )


# ---- what is caught ----


@pytest.mark.parametrize("name", SMALL)
def test_student_and_dynamic_teacher_give_copies_of_the_same_maps(name: str) -> None:
    build, side, names = SMALL[name]
    student = build().double().eval()
    shape = (3, side, side)
    pair = expand(student, sample=torch.zeros(2, *shape), ratio=2, branches=2)
    places = find_features(student, shape, names=names)
    wide = find_features(pair.teacher, shape, like=places)
    assert [s.name for s in wide.stages] == [s.name for s in places.stages]
    assert [s.channels for s in wide.stages] == [2 * s.channels for s in places.stages]
    assert (wide.classifier, wide.embedding) == (places.classifier, 2 * places.embedding)

    taps, wide_taps = FeatureHooks(pair.narrow, places), FeatureHooks(pair.teacher, wide)
    images = torch.randn(2, *shape, dtype=torch.float64)
    logits, wide_logits = pair(images)
    ours, theirs = taps.take(logits), wide_taps.take(wide_logits)
    assert len(ours.stages) == len(theirs.stages) == len(places.stages) > 1
    for stage, one, other in zip(places.stages, ours.stages, theirs.stages, strict=True):
        assert one.shape == (2, stage.channels, stage.height, stage.width)
        channels, copies = (m.detach().transpose(0, 1).flatten(1) for m in (one, other))
        distances = torch.cdist(copies, channels, compute_mode="donot_use_mm_for_euclid_dist")
        near = 1e-6 * channels.std()
        assert near > 0
        assert distances.min(dim=1).values.max() < near  # each is a copy
        assert distances.min(dim=0).values.max() < near  # of each there is one
    for caught in (ours, theirs):
        assert caught.embedding is not None and caught.weight is not None
        again = nn.functional.linear(caught.embedding, caught.weight, caught.bias)
        torch.testing.assert_close(again, caught.logits)
        # Gradients go from everything that was caught to the weights.
        reached = [*caught.stages, caught.embedding, caught.weight]
        weights = [p for p in pair.parameters() if p.requires_grad]
        for tensor in reached:
            loss = (tensor * torch.randn_like(tensor)).sum()
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)


def test_what_is_overwritten_later_is_kept_as_it_was() -> None:
    # timm adds the shortcut to the output of bn2 in place, and rectifies that in place.
    network, images = small_resnet(), torch.randn(2, 3, 64, 64)
    places = find_features(network, (3, 64, 64), names=["layer1.0.conv2", "layer1.0.bn2", "layer1"])
    assert [stage.overwritten for stage in places.stages] == [False, True, False]
    taps = FeatureHooks(network, places)
    before, normed, after = taps.take(network(images)).stages
    expected = nn.functional.batch_norm(before, None, None, training=True)
    torch.testing.assert_close(normed, expected)
    assert normed.min() < 0 <= after.min()
    (gradient,) = torch.autograd.grad(normed.square().sum(), network.conv1.weight)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d, nn.FeatureAlphaDropout])
def test_what_dropout_overwrites_in_train_mode_is_kept_as_it_was(
    dropout: Callable[..., nn.Module],
) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), dropout(0.9, inplace=True), nn.Flatten(), nn.Linear(4 * 36, 5)
    )
    images = torch.randn(2, 3, 8, 8)
    taps = FeatureHooks(network, find_features(network, (3, 8, 8), names=["0"]))
    (caught,) = taps.take(network(images)).stages
    torch.testing.assert_close(caught, network[0](images))


def test_what_was_caught_is_given_once() -> None:
    network = small_resnet()
    taps = FeatureHooks(network, find_features(network, (3, 64, 64)))
    first = taps.take(network(torch.randn(2, 3, 64, 64)))
    second = taps.take(network(torch.randn(3, 3, 64, 64)))
    assert {len(m) for m in first.stages} == {2} and {len(m) for m in second.stages} == {3}
    with pytest.raises(MethodError, match="Module 'layer1' did not run"):
        taps.take(first.logits)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))],
    ids=["deepcopy", "pickle"],
)
def test_copies_catch_nothing(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    network, images = small_resnet().eval(), torch.randn(2, 3, 64, 64)
    taps = FeatureHooks(network, find_features(network, (3, 64, 64)))
    logits = network(images)
    caught = taps.take(logits)
    twin = duplicate(network)
    assert torch.equal(twin(images), logits)
    with pytest.raises(MethodError, match="did not run"):
        taps.take(logits)
    assert torch.equal(taps.take(network(images)).stages[0], caught.stages[0])


def test_copies_are_made_with_features_in_hand() -> None:
    network = small_resnet()
    taps = FeatureHooks(network, find_features(network, (3, 64, 64)))
    logits = network(torch.randn(2, 3, 64, 64))
    # Tensors with a graph cannot be copied: the copy must not try.
    whole = copy.deepcopy(nn.ModuleList([network]))
    assert hooks(whole) == hooks(network)
    copy.deepcopy(taps)
    assert len(taps.take(logits).stages) == 4


def test_the_student_is_extracted_while_taps_are_on() -> None:
    student, shape = small_resnet().eval(), (3, 64, 64)
    pair = expand(student, sample=torch.zeros(2, *shape), ratio=2, branches=1)
    taps = FeatureHooks(pair.narrow, find_features(student, shape))
    images = torch.randn(2, *shape)
    logits, _ = pair(images)
    assert torch.equal(pair.extract()(images), logits)
    assert taps.take(logits).stages[0].requires_grad


def test_remove_takes_every_hook_away() -> None:
    network = small_resnet()
    taps = FeatureHooks(network, find_features(network, (3, 64, 64)))
    assert hooks(network) == 5
    logits = network(torch.randn(2, 3, 64, 64))
    taps.remove()
    assert hooks(network) == 0
    with pytest.raises(MethodError):
        taps.take(logits)


def test_without_gradient_nothing_has_a_graph() -> None:
    network = small_resnet()
    taps = FeatureHooks(network, find_features(network, (3, 64, 64)))
    with torch.no_grad():
        caught = taps.take(network(torch.randn(2, 3, 64, 64)))
    assert caught.embedding is not None
    assert not any(t.requires_grad for t in (*caught.stages, caught.embedding))


def test_detached_outputs_have_the_same_values() -> None:
    network = small_resnet()
    taps = FeatureHooks(network, find_features(network, (3, 64, 64)))
    caught = taps.take(network(torch.randn(2, 3, 64, 64)))
    plain = caught.detach()
    assert caught.stages[0].requires_grad and not plain.stages[0].requires_grad
    assert plain.weight is not None and caught.weight is not None
    assert not plain.weight.requires_grad and torch.equal(plain.weight, caught.weight)


def test_nothing_to_look_at_gives_logits_only() -> None:
    network = small_resnet()
    taps = FeatureHooks(network, FeatureInfo())
    logits = network(torch.randn(2, 3, 64, 64))
    assert hooks(network) == 0 and taps.take(logits) == Outputs(logits)


# ---- methods on what is caught ----


@pytest.mark.parametrize("make", [FitNets, AT, CATKD, lambda: ReviewKD(width=8)])
@pytest.mark.parametrize("name", ["cifar_resnet8", "vit"])
def test_student_and_dynamic_teacher_learn_from_a_static_teacher(
    make: Callable[[], Method], name: str
) -> None:
    build, side, _ = SMALL[name]
    student, shape = build(), (3, side, side)
    teacher = build().eval()
    pair = expand(student, sample=torch.zeros(2, *shape), ratio=2, branches=2)
    places, theirs = find_features(student, shape), find_features(teacher, shape)
    wide = find_features(pair.teacher, shape, like=places)
    methods = [make(), make()]
    for method, where in zip(methods, (places, wide), strict=True):
        method.build(where, theirs)
    taps = [FeatureHooks(pair.narrow, places), FeatureHooks(pair.teacher, wide)]
    static = FeatureHooks(teacher, theirs)
    images = torch.randn(2, *shape)
    outputs = [tap.take(logits) for tap, logits in zip(taps, pair(images), strict=True)]
    with torch.no_grad():
        target = static.take(teacher(images))
    labels = Batch(torch.tensor([1, 2]))
    losses = [m(ours, target, labels) for m, ours in zip(methods, outputs, strict=True)]
    weights = [p for p in pair.parameters() if p.requires_grad]
    for loss in losses:
        assert loss.ndim == 0 and bool(loss.isfinite())
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)
    torch.stack(losses).sum().backward()
    assert all(p.grad is not None for method in methods for p in method.parameters())
    assert all(p.grad is None for p in teacher.parameters())
