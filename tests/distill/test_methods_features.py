"""Methods on feature maps against the published formulas, written again in numpy."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs, Stage
from gpd_cli.distill.methods import Batch, Method
from gpd_cli.distill.methods.attention import AT, attention_loss
from gpd_cli.distill.methods.catkd import CATKD, class_activation, class_attention_loss
from gpd_cli.distill.methods.fitnets import FitNets, hint_loss, regressor
from gpd_cli.distill.methods.maps import pool_to, same_size
from gpd_cli.distill.methods.reviewkd import Fusion, ReviewKD, context_loss, review_loss
from gpd_cli.errors import MethodError

Array = npt.NDArray[np.float64]

MAKE: dict[str, Callable[[], Method]] = {
    "fitnets": FitNets,
    "at": AT,
    "reviewkd": lambda: ReviewKD(width=6),
    "catkd": CATKD,
}


def stored(*shape: int, step: float) -> Tensor:
    """``sin(step * (k + 1))`` for the k-th entry, in float64: the stored tensors of these tests."""
    return torch.sin(step * torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)).view(shape)


def places(channels: Sequence[int], sizes: Sequence[int], embedding: int = 0) -> FeatureInfo:
    stages = [
        Stage(f"layer{k}", "map", c, size, size)
        for k, (c, size) in enumerate(zip(channels, sizes, strict=True), 1)
    ]
    return FeatureInfo(tuple(stages), "fc" if embedding else None, embedding)


NETWORK = places([3, 4, 5], [8, 4, 2], 5)
TEACHER = places([4, 6, 8], [8, 4, 2], 8)
LARGER = places([4, 6, 8], [12, 6, 3], 8)


def outputs(where: FeatureInfo, dtype: torch.dtype = torch.float32, grad: bool = False) -> Outputs:
    """Random outputs of two images and three classes."""

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    maps = tuple(make(2, s.channels, s.height, s.width) for s in where.stages)
    width = where.embedding
    return Outputs(make(2, 3), maps, make(2, width), make(3, width), make(3))


def batch() -> Batch:
    return Batch(torch.tensor([0, 2]))


def built(name: str, teacher: FeatureInfo = TEACHER) -> Method:
    method = MAKE[name]()
    method.build(NETWORK, teacher)
    return method


# ---- the formulas again, in numpy ----


def pooled(maps: Array, size: int) -> Array:
    """Means over the cells of a grid that may overlap."""
    height, width = maps.shape[2:]
    result = np.empty((*maps.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, math.ceil((i + 1) * height / size))
            columns = slice(j * width // size, math.ceil((j + 1) * width / size))
            result[:, :, i, j] = maps[:, :, rows, columns].mean(axis=(2, 3))
    return result


def context(student: Array, teacher: Array) -> float:
    total, weights, weight = float(((student - teacher) ** 2).mean()), 1.0, 1.0
    for level in (4, 2, 1):
        if level < student.shape[2]:
            weight /= 2
            gap = pooled(student, level) - pooled(teacher, level)
            total, weights = total + weight * float((gap**2).mean()), weights + weight
    return total / weights


def convolved(maps: Array, weight: Array) -> Array:
    """A convolution that keeps the size, without bias."""
    edge = weight.shape[2] // 2
    height, width = maps.shape[2:]
    padded = np.pad(maps, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    result = np.zeros((len(maps), len(weight), height, width))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            window = padded[:, :, i : i + height, j : j + width]
            result += np.einsum("oc,bchw->bohw", weight[:, :, i, j], window)
    return result


def batch_normed(maps: Array, gain: Array, shift: Array) -> Array:
    mean, variance = (f(maps, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    normal = (maps - mean) / np.sqrt(variance + 1e-5)
    return normal * gain[None, :, None, None] + shift[None, :, None, None]


def nearest(maps: Array, size: tuple[int, int]) -> Array:
    rows = [k * maps.shape[2] // size[0] for k in range(size[0])]
    columns = [k * maps.shape[3] // size[1] for k in range(size[1])]
    return maps[:, :, rows][:, :, :, columns]


def fuse(
    weights: dict[str, Array], maps: Array, deeper: Array | None, size: tuple[int, int]
) -> tuple[Array, Array]:
    def block(x: Array, name: str) -> Array:
        x = convolved(x, weights[f"{name}.0.weight"])
        return batch_normed(x, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"])

    fused = block(maps, "enter")
    if deeper is not None:
        deeper = nearest(deeper, fused.shape[2:])
        both = np.concatenate([fused, deeper], axis=1)
        scores = convolved(both, weights["attention.weight"])
        scores += weights["attention.bias"][None, :, None, None]
        shares = 1 / (1 + np.exp(-scores))
        fused = fused * shares[:, :1] + deeper * shares[:, 1:]
    fused = nearest(fused, size)
    return block(fused, "leave"), fused


def set_weights(module: nn.Module) -> dict[str, Array]:
    """Weights by the formula of `stored`, a step of 0.1 for the first, 0.2 for the next..."""
    state = dict(module.named_parameters())
    for k, name in enumerate(sorted(state), 1):
        state[name].data = stored(*state[name].shape, step=0.1 * k)
    return {name: value.detach().numpy() for name, value in state.items()}


# ---- ReviewKD ----


@pytest.mark.parametrize(
    ("size", "expected"),
    # Made once by `context` above, in numpy, of the same sines, and stored.
    [
        (8, 0.685602607),
        (7, 0.604876721),
        (4, 0.659808756),
        (2, 0.894845588),
        (1, 0.980826898),
    ],
)
def test_context_loss_is_the_published_one(size: int, expected: float) -> None:
    ours, theirs = stored(2, 3, size, size, step=0.7), stored(2, 3, size, size, step=0.3)
    loss = context_loss(ours, theirs).item()
    assert loss == pytest.approx(context(ours.numpy(), theirs.numpy()), abs=1e-12)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert context_loss(ours.float(), theirs.float()).item() == pytest.approx(expected, abs=1e-6)


def test_context_loss_by_hand() -> None:
    # One image, one channel, 2 x 2: differences 1, 2, 3, 4, of mean square 7.5 and mean 2.5;
    # (1 * 7.5 + 1/2 * 2.5^2) / (1 + 1/2) = 10.625 / 1.5.
    ours = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert context_loss(ours, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(10.625 / 1.5)


@pytest.mark.parametrize(
    ("size", "expected"),
    # Sums of the squares of both results, made once by `fuse` above, in numpy, and stored.
    [(4, (157.20570164, 234.27678376)), (6, (353.71284643, 559.74014937))],
)
def test_fusion_is_the_published_one(size: int, expected: tuple[float, float]) -> None:
    fusion = Fusion(3, 4, 5, deepest=False).double()
    weights = set_weights(fusion)
    maps, deeper = stored(2, 3, 4, 4, step=0.7), stored(2, 4, 2, 2, step=0.3)
    results = fusion(maps, deeper, (size, size))
    again = fuse(weights, maps.numpy(), deeper.numpy(), (size, size))
    for result, other, figure in zip(results, again, expected, strict=True):
        torch.testing.assert_close(result, torch.from_numpy(other), rtol=0, atol=1e-9)
        assert result.square().sum().item() == pytest.approx(figure, abs=1e-6)


@pytest.mark.parametrize("teacher", [TEACHER, LARGER])
@pytest.mark.parametrize("use_embedding", [True, False])
def test_reviewkd_is_fusion_from_deep_to_shallow(teacher: FeatureInfo, use_embedding: bool) -> None:
    method = ReviewKD(width=6, use_embedding=use_embedding, weight=2.0).double()
    method.build(NETWORK, teacher)
    method.double()
    ours, theirs = (outputs(where, torch.float64) for where in (NETWORK, teacher))
    maps, targets = ([*(m.numpy() for m in o.stages)] for o in (ours, theirs))
    if use_embedding:
        for side, given in ((maps, ours), (targets, theirs)):
            assert given.embedding is not None
            side.append(given.embedding.numpy()[:, :, None, None])
    expected, deeper = 0.0, None
    for fusion, one, target in zip(
        list(method.fusions)[::-1], maps[::-1], targets[::-1], strict=True
    ):
        result, deeper = fuse(set_weights(fusion), one, deeper, target.shape[2:])
        expected += 2 * context(result, target)
    assert method(ours, theirs, batch()).item() == pytest.approx(expected, abs=1e-9)


def test_reviewkd_uses_all_its_parts_in_every_step() -> None:
    method = built("reviewkd")
    method(outputs(NETWORK), outputs(TEACHER), batch()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


@pytest.mark.parametrize(("channels", "width"), [(64, 64), (512, 512), (1024, 512)])
def test_reviewkd_is_as_wide_as_the_deepest_features(channels: int, width: int) -> None:
    method = ReviewKD()
    where = places([8, channels], [2, 1], channels)
    method.build(where, where)
    assert {fusion.enter[0].out_channels for fusion in method.fusions} == {width}  # type: ignore


def test_reviewkd_refuses_networks_without_classifier() -> None:
    without = places([4, 6, 8], [8, 4, 2])
    with pytest.raises(MethodError, match="use_embedding"):
        ReviewKD().build(NETWORK, without)
    ReviewKD(use_embedding=False).build(NETWORK, without)


# ---- the others ----


def test_attention_transfer_against_numpy() -> None:
    ours = [stored(2, 3, 4, 4, step=0.7), stored(2, 5, 2, 2, step=0.4)]
    theirs = [stored(2, 6, 8, 8, step=0.3), stored(2, 4, 2, 2, step=0.9)]

    def attention(maps: Tensor, size: int) -> Array:
        sums = (pooled(maps.numpy(), size) ** 2).sum(axis=1).reshape(2, -1)
        return sums / np.sqrt((sums**2).sum(axis=1, keepdims=True))

    expected = sum(
        float(((attention(s, size) - attention(t, size)) ** 2).mean())
        for s, t, size in zip(ours, theirs, (4, 2), strict=True)
    )
    # What the code of Tian et al. gives for the same sines, stored.
    assert expected == pytest.approx(0.0593521280, abs=1e-9)
    assert attention_loss(ours, theirs).item() == pytest.approx(expected, abs=1e-12)
    assert attention_loss(theirs, ours).item() == pytest.approx(expected, abs=1e-12)


def test_attention_transfer_sees_places_and_no_scale() -> None:
    maps = torch.randn(2, 3, 4, 4)
    assert attention_loss([maps], [7 * maps.repeat(1, 2, 1, 1)]).item() < 1e-12
    assert attention_loss([maps], [maps.flip(3)]).item() > 1e-4


def test_attention_of_unequal_sizes_is_that_of_pooled_maps() -> None:
    # A map of +1 and -1 in turns has an attention, its mean over pairs of positions has none.
    signs = torch.tensor([1.0, -1.0]).repeat(2).expand(1, 1, 4, 4)
    smaller = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    assert attention_loss([signs], [smaller]).item() == pytest.approx(1 / 4)


@pytest.mark.parametrize(("stage", "index"), [(None, 1), (1, 0), (3, 2)])
def test_fitnets_regresses_the_chosen_stage(stage: int | None, index: int) -> None:
    method = FitNets(stage, weight=3.0)
    method.build(NETWORK, LARGER)
    method.double()
    ours, theirs = outputs(NETWORK, torch.float64), outputs(LARGER, torch.float64)
    regressed = regress(set_weights(method.regressor), ours.stages[index].numpy())
    hint = pooled(theirs.stages[index].numpy(), ours.stages[index].shape[-1])
    expected = 3 * float(((regressed - hint) ** 2).mean())
    assert method(ours, theirs, batch()).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "result", "expected"),
    # Sums of the result's squares; the code of Tian et al. gives the same for the same sines.
    [(4, 4, 195.16576777), (8, 4, 194.83410644), (4, 8, 777.02025626)],
)
def test_regressor_is_that_of_the_literature(size: int, result: int, expected: float) -> None:
    ours, theirs = (places([c], [s]).stages[0] for c, s in ((3, size), (5, result)))
    module = regressor(ours, theirs).double()
    maps = stored(2, 3, size, size, step=0.7)
    again = regress(set_weights(module), maps.numpy(), size, result)
    torch.testing.assert_close(module(maps), torch.from_numpy(again), rtol=0, atol=1e-9)
    assert float((again**2).sum()) == pytest.approx(expected, abs=1e-6)
    assert again.min() == 0 and again.shape[2] == result


def regress(weights: dict[str, Array], maps: Array, size: int = 1, result: int = 1) -> Array:
    """FitNets' regressor from maps of one size to another: convolution, norm, ReLU."""
    weight, bias = weights["0.weight"], weights["0.bias"][None, :, None, None]
    if 2 * size == result:
        # Transposed: each position is spread over 4 x 4 positions two apart, an edge cut off.
        spread = np.zeros((len(maps), weight.shape[1], result + 2, result + 2))
        for i in range(size):
            for j in range(size):
                part = np.einsum("bc,coxy->boxy", maps[:, :, i, j], weight)
                spread[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += part
        regressed = spread[:, :, 1:-1, 1:-1] + bias
    else:
        step = 2 if size == 2 * result else 1
        regressed = convolved(maps, weight)[:, :, ::step, ::step] + bias
    return np.maximum(batch_normed(regressed, weights["1.weight"], weights["1.bias"]), 0)


def test_fitnets_refuses_unknown_stages() -> None:
    with pytest.raises(MethodError, match="must be 1 or more, not 0"):
        FitNets(0)
    with pytest.raises(MethodError, match=r"stage 4, .* have 3 stages"):
        FitNets(4).build(NETWORK, TEACHER)


@pytest.mark.parametrize("make", [FitNets, AT, ReviewKD, CATKD])
def test_weights_scale_the_loss_and_are_not_negative(make: Callable[..., Method]) -> None:
    ours, theirs, losses = outputs(NETWORK), outputs(TEACHER), []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)  # of the trained parts
        method = make(weight=weight)
        method.build(NETWORK, TEACHER)
        losses.append(method(ours, theirs, batch()).item())
    assert losses[1] == pytest.approx(3 * losses[0])
    with pytest.raises(MethodError, match="0 or more and finite, not -1"):
        make(weight=-1.0)


@pytest.mark.parametrize("normalize", [True, False])
def test_class_attention_against_numpy(normalize: bool) -> None:
    ours, theirs = outputs(NETWORK, torch.float64), outputs(LARGER, torch.float64)

    def activation(given: Outputs) -> Array:
        assert given.weight is not None
        maps = np.einsum("cf,bfhw->bchw", given.weight.numpy(), given.stages[-1].numpy())
        maps = pooled(maps, 2)
        norm = np.sqrt((maps**2).sum(axis=(2, 3), keepdims=True)) if normalize else 1.0
        return maps / norm

    expected = 2 * float(((activation(ours) - activation(theirs)) ** 2).mean())
    loss = CATKD(normalize=normalize, weight=2.0)(ours, theirs, batch())
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_class_activation_averages_to_the_logits() -> None:
    maps, weight = torch.randn(2, 5, 6, 6), torch.randn(3, 5)
    logits = F.linear(maps.mean(dim=(2, 3)), weight)
    torch.testing.assert_close(class_activation(maps, weight, 3).mean(dim=(2, 3)), logits)


@pytest.mark.parametrize(
    "unsuitable",
    [
        places([3, 4, 5], [8, 4, 2], 7),  # more layers between the last stage and the classifier
        places([3, 4, 5], [8, 4, 2]),  # no classifier
        places([3, 4, 5], [4, 2, 1], 5),  # nothing that differs by place
        places([], [], 5),
    ],
)
def test_class_attention_refuses_networks_it_is_not_defined_for(unsuitable: FeatureInfo) -> None:
    with pytest.raises(MethodError, match=r"trained network\b.*--model\.stages"):
        CATKD().build(unsuitable, TEACHER)
    with pytest.raises(MethodError, match=r"static teacher\b.*--model\.static_teacher\.stages"):
        CATKD().build(NETWORK, unsuitable)


def test_class_attention_refuses_a_single_place() -> None:
    with pytest.raises(MethodError, match="2 or more"):
        CATKD(resolution=1)


# ---- all of them ----


@pytest.mark.parametrize("name", ["fitnets", "at", "reviewkd"])
def test_other_numbers_of_stages_are_refused(name: str) -> None:
    with pytest.raises(MethodError, match="2 stages and the static teacher 3"):
        MAKE[name]().build(places([3, 4], [4, 2], 4), TEACHER)


@pytest.mark.parametrize("name", MAKE)
def test_the_loss_is_a_mean_over_the_batch(name: str) -> None:
    method = built(name).eval()  # batch norm aside
    ours, theirs = outputs(NETWORK), outputs(TEACHER)

    def of(rows: list[int]) -> float:
        def take(given: Outputs) -> Outputs:
            assert given.embedding is not None
            maps = tuple(m[rows] for m in given.stages)
            return Outputs(
                given.logits[rows], maps, given.embedding[rows], given.weight, given.bias
            )

        return float(method(take(ours), take(theirs), Batch(torch.tensor(rows))).item())

    assert of([0, 1]) == pytest.approx((of([0]) + of([1])) / 2, rel=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_gradients_reach_the_network_and_the_trained_parts(name: str) -> None:
    method = built(name, LARGER)
    ours = outputs(NETWORK, grad=True)
    method(ours, outputs(LARGER), batch()).backward()
    used = [m for m in ours.stages if m.grad is not None]
    assert used and all(bool(m.grad.abs().sum() > 0) for m in used if m.grad is not None)
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("teacher", [TEACHER, LARGER])
def test_gradients_are_exact(name: str, teacher: FeatureInfo) -> None:
    method = built(name, teacher).double()
    theirs = outputs(teacher, torch.float64)
    ours = outputs(NETWORK, torch.float64)

    def loss(*tensors: Tensor) -> Any:
        given = Outputs(ours.logits, tensors[:3], tensors[3], tensors[4])
        return method(given, theirs, batch())

    assert ours.embedding is not None and ours.weight is not None
    inputs = [t.requires_grad_() for t in (*ours.stages, ours.embedding, ours.weight)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("name", MAKE)
def test_half_precision_maps_give_float32_losses(name: str) -> None:
    method = built(name)
    ours, theirs = outputs(NETWORK), outputs(TEACHER)
    exact = method(ours, theirs, batch())

    def half(given: Outputs) -> Outputs:
        maps = tuple(m.bfloat16() for m in given.stages)
        return Outputs(given.logits, maps, given.embedding, given.weight, given.bias)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(half(ours), half(theirs), batch())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.parametrize("name", ["at", "catkd"])
def test_autocast_does_not_round_losses_without_trained_parts(name: str) -> None:
    method, ours, theirs = built(name), outputs(NETWORK), outputs(LARGER)
    exact = method(ours, theirs, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert method(ours, theirs, batch()).item() == exact.item()


@pytest.mark.parametrize("name", MAKE)
def test_a_network_in_bfloat16_altogether(name: str) -> None:
    method = built(name).bfloat16()
    ours, theirs = outputs(NETWORK, torch.bfloat16), outputs(TEACHER, torch.bfloat16)
    assert ours.embedding is not None
    ours = Outputs(ours.logits, ours.stages, ours.embedding.float(), ours.weight)
    loss = method(ours, theirs, batch())
    assert loss.dtype == torch.float32 and bool(loss.isfinite())


@pytest.mark.parametrize("name", MAKE)
def test_a_copy_gives_the_same_loss_and_learns_on_its_own(name: str) -> None:
    method = built(name)
    ours, theirs = outputs(NETWORK), outputs(TEACHER)
    twin = copy.deepcopy(method)
    loss = method(ours, theirs, batch())
    assert twin(ours, theirs, batch()).item() == loss.item()
    for p in twin.parameters():
        p.data.zero_()
    assert all(bool(p.abs().sum() > 0) for p in method.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", ["at", "catkd"])
def test_equal_features_have_no_loss(name: str) -> None:
    ours = outputs(TEACHER)
    assert MAKE[name]()(ours, ours, batch()).item() < 1e-10
    assert MAKE[name]()(ours, outputs(TEACHER), batch()).item() > 1e-4


# ---- sizes ----


@pytest.mark.parametrize("size", [(4, 4), (3, 2), (7, 5), (1, 1)])
def test_deterministic_pooling_is_the_same_pooling(size: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    expected = F.adaptive_avg_pool2d(maps, size)
    (gradient,) = torch.autograd.grad(expected.square().sum(), maps)
    torch.use_deterministic_algorithms(True)
    try:
        result = pool_to(maps, size)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result.square().sum(), maps)[0], gradient, rtol=1e-9, atol=1e-12
    )


def test_sizes_meet_at_the_smaller_side() -> None:
    one, other = same_size(torch.randn(1, 2, 6, 2), torch.randn(1, 3, 4, 4))
    assert one.shape == (1, 2, 4, 2) and other.shape == (1, 3, 4, 2)


def test_pure_losses_take_what_their_classes_take() -> None:
    ours, theirs = stored(2, 3, 4, 4, step=0.7), stored(2, 3, 4, 4, step=0.3)
    assert review_loss([ours, ours], [theirs, theirs]).item() == pytest.approx(
        2 * context(ours.numpy(), theirs.numpy())
    )
    square = float(((ours - theirs) ** 2).mean())
    assert hint_loss(ours, theirs).item() == pytest.approx(square)
    assert class_attention_loss(ours, theirs, normalize=False).item() == pytest.approx(square)
