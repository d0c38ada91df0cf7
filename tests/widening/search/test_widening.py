"""What decides how a network widens: exclusions, multiples, ratios, rules, and trial."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import attention
from exactness import assert_exact
from gpd_cli import ExpansionError, Pair, expand
from gpd_cli.widening.observe.record import record
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.rules import RULES, Rule
from gpd_cli.widening.search.find import find_plan

IMAGE = (2, 3, 16, 16)


def exact(student: nn.Module, x: Tensor | None = None, **options) -> Pair:
    """As `assert_exact`, with two branches, on images of 16 pixels unless others are given."""
    x = torch.randn(5, *IMAGE[1:], dtype=torch.float64) if x is None else x
    return assert_exact(student, x, **{"branches": 2, **options})


def widths(pair: Pair) -> dict[str, int]:
    """Output channels of every convolution and linear layer of the teacher."""
    return {
        name: len(module.weight)
        for name, module in pair.teacher.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


class Block(nn.Module):
    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm(self.conv1(x)).relu())


def convnet(groups: int = 1, width: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
        Block(width, groups),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 7)),
    )


# Ratios


@pytest.mark.parametrize("ratio", [1.25, 1.5, 2, 2.5, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 5, 10])
def test_any_ratio_widens_networks_with_batch_norm(ratio: float, groups: int) -> None:
    found = widths(exact(convnet(groups), ratio=ratio))
    assert 0.9 * ratio <= found["0.0"] / 10 <= 1.2 * ratio
    assert found["2.2"] == 7
    assert found["1.conv1"] > 20


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("ratio", [1.25, 1.5, 2.5])
def test_fractional_ratios_of_real_networks(name: str, ratio: float) -> None:
    student = timm.create_model(name, num_classes=5, drop_path_rate=0.0)
    pair = exact(student, torch.randn(3, 3, 64, 64, dtype=torch.float64), ratio=ratio)
    before = sum(p.numel() for p in student.parameters())
    after = sum(p.numel() for p in pair.teacher.parameters())
    assert after > 0.7 * ratio**2 * before


def test_layer_norm_over_uneven_copies_is_refused_with_the_reason() -> None:
    student = timm.create_model("test_vit", num_classes=5)
    with pytest.raises(ExpansionError, match=r"LayerNorm.*not all copied equally often.*ratio"):
        expand(student, sample=torch.randn(2, 3, 160, 160), ratio=1.3, branches=1)


# Options


def test_widths_are_rounded_up_to_a_multiple() -> None:
    found = widths(exact(convnet(), ratio=1.5, width_multiple=8))
    assert {found["0.0"], found["1.conv1"], found["1.conv2"]} == {16, 32}
    assert found["2.2"] == 7


def test_heads_are_not_rounded() -> None:
    student = timm.create_model("test_vit", num_classes=5)
    sample = torch.randn(3, 3, 160, 160, dtype=torch.float64)
    pair = exact(student, sample, ratio=2, width_multiple=8)
    assert (
        pair.teacher.get_submodule("blocks.0.attn").num_heads
        == 2 * student.blocks[0].attn.num_heads
    )


@pytest.mark.parametrize("pattern", ["1.conv1", "1.*1", "1.conv?"])
def test_excluded_layers_keep_their_width(pattern: str) -> None:
    if pattern == "1.conv?":
        with pytest.raises(ExpansionError, match=r"exclude"):  # the sum with what is wide
            exact(convnet(), exclude=[pattern])
        return
    found = widths(exact(convnet(), exclude=[pattern]))
    assert found["1.conv1"] == 20
    assert found["1.conv2"] == found["0.0"] == 20


def test_a_whole_module_can_be_excluded() -> None:
    student = nn.Sequential(
        convnet()[0],
        nn.Sequential(nn.Conv2d(10, 6, 1), nn.ReLU()),
        *[nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)],
    )
    found = widths(exact(student, exclude=["1"]))
    assert (found["0.0"], found["1.0"], found["2"], found["5"]) == (20, 6, 16, 3)


def test_a_pattern_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(ExpansionError, match=r"'layer9\.\*'.*patterns of layer names"):
        expand(convnet(), sample=torch.randn(IMAGE), exclude=["layer9.*"])


@pytest.mark.parametrize("multiple", [0, -8, 1.5])
def test_a_multiple_below_1_is_an_error(multiple: float) -> None:
    with pytest.raises(ExpansionError, match="multiple"):
        expand(convnet(), sample=torch.randn(IMAGE), width_multiple=multiple)


def test_plans_survive_being_written() -> None:
    plan = find_plan(timm.create_model("test_vit", num_classes=5), torch.randn(2, 3, 160, 160), 2)
    assert WidthPlan.from_dict(plan.to_dict()) == plan


def test_the_plan_of_a_smaller_image_is_that_of_the_whole_one() -> None:
    student = timm.create_model("test_efficientnet", num_classes=5)
    sample = torch.randn(2, 3, 160, 160)
    assert find_plan(student, sample, 2) == find_plan(student, sample, 2, shrink=False)


# Trial and rules


class Attention(nn.Module):
    """Attention with attribute names of its own; heads are as many as channels per head."""

    def __init__(self, width: int, count: int, name: str, order: str) -> None:
        super().__init__()
        setattr(self, name, count)
        self.name, self.order = name, order
        self.to_all = nn.Sequential(nn.Linear(width, 3 * width), nn.Identity())
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))
        self.table = nn.Parameter(torch.zeros(count, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        count = getattr(self, self.name)
        if self.order == "parts first":
            split = self.to_all(x).reshape(batch, tokens, 3, count, -1).permute(2, 0, 3, 1, 4)
            q, k, v = split.unbind(0)
        else:
            q, k, v = self.to_all(x).reshape(batch, tokens, count, -1).transpose(1, 2).chunk(3, -1)
        products = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.table
        return self.out((products.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Transformer(nn.Module):
    def __init__(self, attention: nn.Module, width: int = 9, buffer: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        position = torch.zeros(16, width)
        if buffer:
            self.register_buffer("position", position)
        else:
            self.position = nn.Parameter(position)
        self.norm = nn.LayerNorm(width, elementwise_affine=not buffer)
        self.attention, self.head = attention, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT + self.position
        return self.head((x + self.attention(self.norm(x))).mean(1))


@pytest.mark.parametrize("order", ["parts first", "heads first"])
@pytest.mark.parametrize("name", ["num_heads", "my_number"])
@pytest.mark.parametrize("buffer", [True, False])
def test_attention_of_ones_own_widens_by_what_its_code_says(
    name: str, order: str, buffer: bool
) -> None:
    student = Transformer(Attention(9, 3, name, order), buffer=buffer)
    if not buffer:
        student.position.data.normal_()
    else:
        student.position.normal_()
    pair = exact(student, ratio=2)
    assert getattr(pair.teacher.attention, name) == 6
    assert pair.teacher.attention.table.shape == (6, 16, 16)
    assert not pair.plan.kept_narrow


def test_a_number_from_the_size_of_a_bias_follows_once_the_bias_widens() -> None:
    """As Swin Transformer V2 in torchvision, whose keys have no bias."""
    pair = exact(Transformer(attention.Attention(9, 3, plain_keys=True)))
    assert not pair.plan.kept_narrow
    assert pair.plan.trials == 0
    assert widths(pair)["attention.qkv"] == 54


class OneHead(nn.Module):
    """Products whose scale cannot be told of wider heads: exact only with a narrow inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def test_where_nothing_else_is_exact_the_inside_stays_narrow_and_the_plan_says_so() -> None:
    pair = exact(Transformer(OneHead(9)))
    assert list(pair.plan.kept_narrow) == ["attention"]
    assert "is not a replication" in pair.plan.kept_narrow["attention"]
    found = widths(pair)
    assert (found["attention.q"], found["attention.out"], found["patch"]) == (9, 18, 18)


class Mixed(nn.Module):
    """A layer whose wide outputs have to lie in blocks, told by nothing that could be seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 12)
        self.down = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.up(x)
        return self.down(pairs[..., 0::2] * pairs[..., 1::2])


@pytest.fixture
def rules() -> Iterator[dict[str, Rule]]:
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


def test_a_rule_settles_what_trial_does_not(rules: dict[str, Rule]) -> None:
    student = Transformer(Mixed(9))
    without = exact(student)
    rules["Mixed"] = Rule(blocks={"up": 2})
    pair = exact(student)
    assert list(without.plan.kept_narrow) == ["attention"]
    assert not pair.plan.kept_narrow
    assert widths(pair)["attention.up"] == 24


def test_a_rule_keeps_a_layer_narrow(rules: dict[str, Rule]) -> None:
    rules["Block"] = Rule(blocks={"conv1": 0})
    found = widths(exact(convnet()))
    assert (found["1.conv1"], found["1.conv2"]) == (20, 20)


class Numbers(nn.Module):
    """Reads a number that happens to be its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.number = nn.Linear(width, width), width

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.number else x


@pytest.mark.parametrize(("rule", "number"), [(Rule(), 9), (Rule(grow=["number"]), 18)])
def test_a_number_that_no_call_is_made_with_changes_by_a_rule_only(
    rules: dict[str, Rule], rule: Rule, number: int
) -> None:
    rules["Numbers"] = rule
    assert exact(Transformer(Numbers(9))).teacher.attention.number == number


def test_a_number_that_a_rule_keeps_is_named_where_it_is_in_the_way(rules: dict[str, Rule]) -> None:
    rules["Attention"] = Rule(keep=["num_heads"])
    with pytest.raises(ExpansionError, match=r"self\.num_heads = 3 would have to be 6"):
        exact(Transformer(Attention(9, 3, "num_heads", "parts first")))


@pytest.mark.parametrize(
    "rule", [Rule(grow=["wide"]), Rule(keep=["x"]), Rule(axes={"y": 0}), Rule(blocks={"conv9": 2})]
)
def test_a_rule_about_what_is_not_there_is_refused(rules: dict[str, Rule], rule: Rule) -> None:
    rules["Elsewhere"] = rule  # no such class in the network
    exact(convnet())
    rules["Block"] = rule
    with pytest.raises(ExpansionError, match=r"The rule for Block names '(wide|x|y|conv9)'"):
        exact(convnet())


def test_a_misspelt_rule_of_a_class_is_refused() -> None:
    class Block(nn.Conv2d):
        widening_rule: ClassVar = {"block": {"conv": 2}}

    network = convnet()
    network.append(Block(4, 4, 1))
    with pytest.raises(
        ExpansionError, match=r"widening_rule of Block must .* keys grow, keep, axe"
    ):
        exact(network)


class Stale(nn.Module):
    """Keeps what it computed from its weights in eval mode, until it is trained again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Stale":
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.gain[:, None, None]
        if "gain" not in self.cache:
            self.cache["gain"] = self.gain[:, None, None] * 2 / 2
        return x * self.cache["gain"]


def test_results_kept_from_narrow_weights_do_not_survive_expansion() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3), Stale(4), *convnet()[2:]).eval()
    student[2] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    student(torch.randn(IMAGE))
    exact(student)


class Places(nn.Module):
    """A table of places that the first run makes and later ones keep, as in ConViT."""

    places: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("places", torch.zeros(1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.places.shape[1] != x.shape[1]:
            side = torch.zeros(x.shape[1]).view(1, -1) + torch.arange(x.shape[1])
            self.places = side.to(x)[..., None].reshape(1, -1, 1) / x.shape[1]
        return self.linear(x) * self.places.expand(len(x), -1, -1)


def test_a_table_that_the_first_run_makes_is_kept() -> None:
    assert exact(Transformer(Places(9))).plan.trials == 0


class SingleHead(nn.Module):
    """Attention over pixels whose queries, keys and values lie side by side in each head."""

    def __init__(self, width: int = 8, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.width = num_heads, width // num_heads, width
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        heads = self.qkv(x).reshape(batch, self.num_heads, 3 * self.head_dim, height * width)
        q, k, v = heads.transpose(2, 3).chunk(3, dim=3)
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return self.proj(y.reshape(batch, self.width, height, width))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_single_head_is_copied_as_one_of_several_is(heads: int) -> None:
    pair = exact(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            SingleHead(num_heads=heads),
            convnet()[2][0],
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )
    assert pair.teacher[1].num_heads == 2 * heads
    assert pair.plan.trials == 0 and not pair.plan.kept_narrow


def test_layers_of_one_split_are_listed_in_the_order_of_the_run() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(6, 8) for _ in range(9))

        def forward(self, x: Tensor) -> Tensor:
            first, second = sum(part(x) for part in self.parts).chunk(2, -1)
            return first * second

    splits = record(Sum().double().eval(), torch.randn(2, 6, dtype=torch.float64)).splits
    assert list(splits) == [f"parts.{k}" for k in range(9)]


class Named(nn.Module):
    """Code that passes inputs of layers by name, and cuts channels into unequal pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 7, 1), nn.BatchNorm2d(7), nn.Conv2d(7, 7, 1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(input=self.norm(input=self.one(input=x)).relu())
        x = torch.cat([piece.relu() for piece in x.chunk(3, 1)], 1)
        return self.head(input=x.mean((2, 3)))


def test_inputs_may_be_passed_by_name() -> None:
    pair = exact(Named())
    assert not pair.plan.kept_narrow
    assert widths(pair) == {"one": 14, "two": 14, "head": 3}
