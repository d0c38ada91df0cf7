"""The networks of our own: of the literature on CIFAR-100, and Robust Vision Transformers."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli import expand
from gpd_cli.errors import ModelError
from gpd_cli.models import create_model, input_shape
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.widening.running.randomize import randomize

MASK = 196 * 196  # of a head, with 14 x 14 patches

PARAMETERS = {
    "cifar_wrn_16_1": 180_916,
    "cifar_wrn_16_2": 703_284,
    "cifar_wrn_40_1": 569_780,
    "cifar_wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg11": 9_277_284,
    "cifar_vgg13": 9_462_180,
    "cifar_vgg16": 14_774_436,
    "cifar_vgg19": 20_086_692,
    "cifar_mobilenetv2_half": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
    "cifar_resnet50": 23_705_252,
    "rvt_tiny": 8_646_376,
    "rvt_small": 22_148_392,
    "rvt_tiny_plus": 8_646_376 + 10 * 6 * MASK,
    "rvt_small_plus": 22_148_392 + 5 * 6 * MASK,
}

# Widths and resolutions, by what they are smaller than the image, at which the literature distils.
STAGES = {
    "cifar_resnet8": ([16, 32, 64], [1, 2, 4]),
    "cifar_resnet8x4": ([64, 128, 256], [1, 2, 4]),
    "cifar_resnet50": ([256, 512, 1024, 2048], [1, 2, 4, 8]),
    "cifar_wrn_16_2": ([32, 64, 128], [1, 2, 4]),
    "cifar_vgg8": ([64, 128, 256, 512, 512], [1, 2, 4, 8, 8]),
    "cifar_vgg13": ([64, 128, 256, 512, 512], [1, 2, 4, 8, 8]),
    "cifar_mobilenetv2_half": ([12, 16, 48, 160], [2, 4, 8, 16]),
    "cifar_shufflenetv1": ([240, 480, 960], [2, 4, 8]),
    "cifar_shufflenetv2": ([116, 232, 464], [2, 4, 8]),
    "rvt_tiny": ([192] * 10 + [384] * 2, [16] * 10 + [32] * 2),
    "rvt_small": ([384] * 12, [16] * 12),
}

FAST = ["cifar_resnet8", "cifar_wrn_16_1"]
SLOW = [
    "cifar_resnet8x4",
    "cifar_resnet110",
    "cifar_resnet32x4",
    "cifar_resnet50",
    "cifar_wrn_40_2",
    "cifar_vgg8",
    "cifar_vgg13",
    "cifar_vgg19",
    "cifar_mobilenetv2_half",
    "cifar_shufflenetv1",
    "cifar_shufflenetv2",
    "rvt_tiny",
    "rvt_small",
    "rvt_tiny_plus",
    "rvt_small_plus",
]
SMALL_RVT = {"head_dim": 8, "depths": (2, 2), "heads": (2, 4), "num_classes": 5}


def randomized(network: nn.Module) -> nn.Module:
    randomize(network, torch.Generator().manual_seed(1))
    return network


def small_rvt(**arguments: Any) -> nn.Module:
    return randomized(timm.create_model("rvt_tiny", **{**SMALL_RVT, "img_size": 64, **arguments}))


def assert_expands(student: nn.Module, side: int) -> None:
    """Exactly, whole, and back to the last bit."""
    before = student.double().state_dict()
    pair = expand(student, sample=torch.zeros(2, 3, side, side), ratio=2, branches=2)
    assert pair.certificate is not None
    assert pair.certificate.difference < 1e-9
    assert sum(p.numel() for p in pair.parameters()) > 3 * sum(map(torch.numel, before.values()))
    extracted = pair.extract().state_dict()
    assert extracted.keys() == before.keys()
    for name in before:
        assert torch.equal(extracted[name], before[name]), name
    images = torch.randn(4, 3, side, side, dtype=torch.float64)
    for training in (False, True):
        with torch.no_grad():
            narrow, wide = pair.train(training)(images)
        assert relative_difference(wide, narrow) < 1e-9


# --- all of them ---


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_published_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in create_model(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_those_of_the_literature(name: str) -> None:
    network = create_model(name).eval()
    side = 64 if name.startswith("rvt") else 32
    shapes: dict[str, torch.Size] = {}
    for module, part in network.named_modules():
        part.register_forward_hook(
            lambda _, __, out, module=module: shapes.update({module: out.shape})
        )
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    channels, reductions = STAGES[name]
    assert [stage["num_chs"] for stage in network.feature_info] == channels
    assert [stage["reduction"] for stage in network.feature_info] == reductions
    for stage in network.feature_info:
        small = side // stage["reduction"]
        shape = (stage["num_chs"], small, small)
        if name.startswith("rvt"):
            shape = (small, small, stage["num_chs"])
        assert shapes[stage["module"]] == (1, *shape), stage


@pytest.mark.parametrize("name", [*PARAMETERS, "cifar_resnet8"])
def test_timm_and_gpd_know_the_network(name: str) -> None:
    assert timm.is_model(name)
    network = timm.create_model(name, num_classes=7, in_chans=1).eval()
    classes, side = (1000, 224) if name.startswith("rvt") else (100, 32)
    assert network.pretrained_cfg["num_classes"] == classes
    assert network.pretrained_cfg["architecture"] == name
    assert timm.data.resolve_model_data_config(network)["input_size"] == (3, side, side)
    assert input_shape(network, name) == (3, side, side)
    modules = dict(network.named_modules())
    assert modules[network.pretrained_cfg["classifier"]] is network.get_classifier()
    assert modules[network.pretrained_cfg["first_conv"]].in_channels == 1

    side = side if name.endswith("plus") else 32
    x = torch.randn(1, 1, side, side)
    with torch.no_grad():
        pooled = network.forward_head(network.forward_features(x), pre_logits=True)
        assert pooled.shape == (1, network.num_features)
        torch.testing.assert_close(network(x), network.get_classifier()(pooled))
        assert network(x).shape == (1, 7)
        network.reset_classifier(0)
        assert torch.equal(network(x), pooled)
        network.reset_classifier(3)
        assert network(x).shape == (1, 3)
    assert network.get_classifier().out_features == network.num_classes == 3


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cifar_resnet50", "conv1.weight layer1.0.shortcut.0.weight layer4.2.bn3.bias linear.bias"),
        ("cifar_wrn_40_2", "conv1.weight block1.layer.0.convShortcut.weight bn1.bias fc.weight"),
        ("cifar_vgg13", "block0.0.weight block0.1.running_mean block4.3.bias classifier.weight"),
        ("cifar_mobilenetv2_half", "conv1.0.weight blocks.6.0.conv.7.bias conv2.1.bias"),
        ("cifar_shufflenetv1", "conv1.weight layer1.0.conv3.weight layer3.3.bn3.bias linear.bias"),
        ("cifar_shufflenetv2", "layer1.0.conv5.weight layer2.7.bn3.bias conv2.weight bn2.weight"),
        (
            "rvt_tiny_plus",
            "patch_embed.proj.3.bias transformers.0.blocks.9.attn.att_mask pools.0.conv.weight "
            "transformers.1.blocks.1.mlp.dwconv.weight norm.weight head.weight",
        ),
    ],
)
def test_parameters_are_named_as_in_published_checkpoints(name: str, keys: str) -> None:
    assert set(keys.split()) <= create_model(name).state_dict().keys()


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_networks_expand_exactly_and_come_back(name: str) -> None:
    arguments = {"img_size": 32} if name.startswith("rvt") else {}
    assert_expands(randomized(timm.create_model(name, **arguments)), 32)


@pytest.mark.parametrize("name", ["cifar_vgg8", "cifar_wrn_16_1", "cifar_shufflenetv2"])
def test_one_step_moves_every_parameter(name: str) -> None:
    network = create_model(name)
    network(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Batch norm takes away what a bias before it adds.
    assert [n for n in still if not n.endswith("bias")] == []


# --- of each family ---


def test_a_wide_resnets_shortcut_is_of_the_activated_input() -> None:
    block = randomized(create_model("cifar_wrn_16_2")).eval().block2.layer[0]
    x = torch.randn(2, 32, 8, 8)
    active = F.relu(F.batch_norm(x, *_statistics(block.bn1)))
    inner = F.conv2d(active, block.conv1.weight, stride=2, padding=1)
    inner = F.relu(F.batch_norm(inner, *_statistics(block.bn2)))
    expected = F.conv2d(inner, block.conv2.weight, padding=1)
    expected = expected + F.conv2d(active, block.convShortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected)
    same = create_model("cifar_wrn_16_2").block2.layer[1].eval()
    nn.init.zeros_(same.conv2.weight)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(same(x), x)


def _statistics(norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def test_a_wide_resnets_depth_is_checked() -> None:
    from gpd_cli.models.cifar_wrn import CifarWideResNet

    with pytest.raises(ValueError, match="depth must be 10, 16, 22 or another 6n"):
        CifarWideResNet(17)


def test_vgg_halves_large_images_once_more() -> None:
    for side, reduction in [(32, 8), (64, 16)]:
        network = create_model("cifar_vgg8", model_args={"img_size": side}).eval()
        features = network.forward_features(torch.zeros(1, 3, side, side))
        assert features.shape == (1, 512, side // reduction, side // reduction)
        assert network.feature_info[-1]["reduction"] == reduction


def test_channels_are_dealt_out_in_turn_and_copies_together() -> None:
    from gpd_cli.models.cifar_shufflenet import shuffle, shuffle_keeping_copies

    def row(*channels: int) -> Tensor:
        return torch.tensor(channels).view(1, -1, 1, 1)

    assert torch.equal(shuffle(row(0, 1, 2, 3, 4, 5), 3), row(0, 2, 4, 1, 3, 5))
    assert torch.equal(shuffle_keeping_copies(row(0, 1, 2, 3, 4, 5), (2, 3)), row(0, 3, 1, 4, 2, 5))
    assert torch.equal(
        shuffle_keeping_copies(row(0, 0, 1, 1, 2, 2, 3, 3), (2, 2)), row(0, 0, 2, 2, 1, 1, 3, 3)
    )


def test_a_mobilenet_adds_the_input_where_the_shape_stays() -> None:
    stage = create_model("cifar_mobilenetv2_half").eval().blocks[2]
    for block, adds in zip(stage, [False, True, True], strict=True):
        nn.init.zeros_(block.conv[-1].weight)
        x = torch.randn(1, block.conv[0].in_channels, 4, 4)
        assert torch.equal(block(x), x if adds else torch.zeros_like(block(x)))


# --- Robust Vision Transformers ---


def test_rvt_attention_scales_products_by_position() -> None:
    from gpd_cli.models.rvt import Attention

    attention = Attention(12, 3, positions=5).double()
    nn.init.normal_(attention.att_mask)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    query, key, value = (x @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, 2)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        products = query[..., part] @ key[..., part].transpose(1, 2) / 2
        scaled = products / (1 + (-attention.att_mask[h]).exp())
        heads.append(scaled.softmax(2) @ value[..., part])
    expected = torch.cat(heads, 2) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected)


def test_rvt_with_open_scaling_is_rvt_without() -> None:
    plain, scaled = small_rvt(), small_rvt(scaled_blocks=2)
    state = scaled.state_dict()
    masks = [name for name in state if name.endswith("att_mask")]
    assert masks == [f"transformers.0.blocks.{k}.attn.att_mask" for k in (0, 1)]
    for name in masks:
        assert state[name].shape == (2, 16, 16)
    x = torch.randn(2, 3, 64, 64)
    state.update(plain.state_dict())
    scaled.load_state_dict(state)
    assert not torch.allclose(scaled.eval()(x), plain.eval()(x))
    scaled.load_state_dict({**state, **{name: torch.full_like(state[name], 40) for name in masks}})
    torch.testing.assert_close(scaled(x), plain(x))


def test_rvt_takes_images_that_are_no_squares() -> None:
    x = torch.randn(2, 3, 64, 96)
    assert small_rvt().eval().forward_features(x).shape == (2, 2, 3, 32)
    scaled = small_rvt(scaled_blocks=1, img_size=(64, 96)).eval()
    assert scaled(x).shape == (2, 5)
    with pytest.raises(ModelError, match=r"is for 24 patches, but this image has 16; .* img_size"):
        scaled(torch.zeros(1, 3, 64, 64))
    patches = small_rvt(patch_size=4).eval().forward_features(torch.zeros(1, 3, 32, 32))
    assert patches.shape == (1, 4, 4, 32)


def test_rvt_leaves_blocks_out_more_often_the_deeper_they_are() -> None:
    from gpd_cli.models.rvt import Block

    network = small_rvt(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for block in network.modules() if isinstance(block, Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 6}, "patch_size must be a multiple of 4, not 6"),
        ({"scaled_blocks": 11}, "scaled_blocks must be at most 10, not 11"),
    ],
)
def test_rvt_tells_what_it_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("rvt_tiny", model_args=arguments)


@pytest.mark.parametrize("scaled", [0, 1])
def test_a_small_rvt_expands_exactly_and_comes_back(scaled: int) -> None:
    assert_expands(small_rvt(scaled_blocks=scaled), 64)
