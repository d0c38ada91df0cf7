"""Why a layer cannot be widened, in the words of the message."""

import pytest
import timm
import torch
from torch import nn

from gpd_cli.widening.layers import UnsupportedLayerError, plan_layer
from gpd_cli.widening.layout import Scale
from gpd_cli.widening.numbers import solve as solving
from gpd_cli.widening.numbers.arithmetic import Attribute
from gpd_cli.widening.numbers.solve import Equation, Unsolvable, solve
from gpd_cli.widening.plan import spread
from gpd_cli.widening.search.find import find_plan


@pytest.mark.parametrize(
    ("layer", "scale", "reason"),
    [
        (nn.MultiheadAttention(8, 4, add_bias_kv=True), Scale(2), r"\(add_bias_kv\) are not"),
        (nn.MultiheadAttention(8, 4, kdim=5), Scale(2), "keys and values of other widths"),
        (
            nn.MultiheadAttention(8, 4),
            Scale(1.125),
            "^ratio 1.125 would make 9 channels of its 8, which is no whole number of heads of 2$",
        ),
        (
            nn.MultiheadAttention(24, 3),
            Scale(1.5, 32),
            "^ratio 1.5 with width_multiple 32 would make 5 heads of its 3, which do not have the "
            "64 channels of its input$",
        ),
        (nn.EmbeddingBag(3, 8, mode="sum"), Scale(2), "per_sample_weights have widened"),
    ],
)
def test_the_reason_names_what_is_in_the_way(layer: nn.Module, scale: Scale, reason: str) -> None:
    size = getattr(layer, "embed_dim", 8)
    axes = (None, None, spread(size, scale.width(size)))
    with pytest.raises(UnsupportedLayerError, match=reason):
        plan_layer(layer, axes, scale, keep_output=False)


def test_a_search_that_was_given_up_does_not_say_that_there_is_no_solution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = Attribute("attn", "num_heads")
    equation = Equation(heads, wanted=12, given=6)
    assert solve([equation], {heads: 6}) == {heads: 12}
    monkeypatch.setattr(solving, "_MOST_STEPS", 0)
    with pytest.raises(Unsolvable, match=r"no solution was found .* in 0 steps"):
        solve([equation], {heads: 6})


@pytest.mark.slow
def test_inception_v4_keeps_nothing_narrow() -> None:
    student = timm.create_model("inception_v4", num_classes=5)
    plan = find_plan(student, torch.zeros(2, 3, 75, 75), 2, is_certified=True)
    assert not plan.kept_narrow
