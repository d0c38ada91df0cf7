"""Every type of layer: from copies in its input, the planned wide layer computes copies."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gpd_cli.widening.layers import LayerPlan, plan_layer
from gpd_cli.widening.layout import Scale
from gpd_cli.widening.match import match_axes
from gpd_cli.widening.names import split_name
from gpd_cli.widening.plan import IndexMap, TensorPlan, spread
from gpd_cli.widening.running.randomize import randomize
from gpd_cli.widening.tensors import expand_tensor, replicate

SHUFFLED = IndexMap(6, (3, 0, 5, 1, 2, 4, 5, 0, 1, 2, 3, 4))
IMAGE, TOKENS = (2, 6, 5, 5), (2, 3, 6)
LAYERS = {
    "linear": (nn.Linear(6, 5), TOKENS, 2, SHUFFLED),
    "linear, uneven": (nn.Linear(6, 5), TOKENS, 2, spread(6, 8)),
    "linear along tokens": (nn.Linear(6, 5), (2, 3, 6), 1, spread(3, 6)),
    "convolution": (nn.Conv2d(6, 4, 3), IMAGE, 1, SHUFFLED),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), IMAGE, 1, spread(6, 12)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), IMAGE, 1, spread(6, 9)),
    "transposed": (nn.ConvTranspose2d(6, 4, 2), IMAGE, 1, SHUFFLED),
    "batch norm": (nn.BatchNorm2d(6), IMAGE, 1, spread(6, 9)),
    "layer norm": (nn.LayerNorm(6), TOKENS, 2, SHUFFLED),
    "group norm": (nn.GroupNorm(2, 6), IMAGE, 1, spread(6, 12)),
    "group norm, groups copied": (nn.GroupNorm(2, 6), IMAGE, 1, spread(2, 4, block=3)),
    "prelu": (nn.PReLU(6), IMAGE, 1, SHUFFLED),
    "attention": (nn.MultiheadAttention(6, 2, batch_first=True), TOKENS, 2, spread(6, 12)),
}


def run(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
    return output


def applied(layer: nn.Module, plan: LayerPlan) -> nn.Module:
    """The wide layer."""
    wide = copy.deepcopy(layer)
    for name, tensor_plan in plan.tensors.items():
        owner, local = split_name(name)
        module = wide.get_submodule(owner)
        tensor = expand_tensor(getattr(module, local), tensor_plan)
        setattr(module, local, tensor if local in module._buffers else nn.Parameter(tensor))
    for name, value in plan.attributes.items():
        setattr(wide, name, value)
    return wide


@pytest.mark.parametrize("name", LAYERS)
def test_a_planned_layer_computes_copies(name: str) -> None:
    narrow, shape, axis, map_ = LAYERS[name]
    layer = copy.deepcopy(narrow).double().eval()
    randomize(layer, torch.Generator().manual_seed(0))
    axes = tuple(map_ if k == axis else None for k in range(len(shape)))
    x = torch.randn(shape, dtype=torch.float64)
    plan = plan_layer(layer, axes, Scale(2), keep_output=False)
    output, wide = run(layer, x), run(applied(layer, plan), replicate(x, TensorPlan(axes)))
    found = match_axes(output, wide)
    assert found is not None
    assert found[axis] is not None


def test_outputs_that_have_to_stay_are_the_students() -> None:
    layer, x = nn.Linear(6, 5).double(), torch.randn(2, 6, dtype=torch.float64)
    plan = plan_layer(layer, (None, SHUFFLED), Scale(2), keep_output=True)
    wide = run(applied(layer, plan), replicate(x, TensorPlan((None, SHUFFLED))))
    torch.testing.assert_close(wide, run(layer, x), rtol=1e-12, atol=1e-12)
