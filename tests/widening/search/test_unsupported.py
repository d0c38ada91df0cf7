"""Students that are wrapped, or keep their weights elsewhere: refused with the true cause."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from exactness import assert_exact
from gpd_cli import ExpansionError, expand
from gpd_cli.widening.search.find import find_plan

SAMPLE = torch.randn(2, 3, 16, 16)


def net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )


def with_layer(change: Callable[[nn.Module], object]) -> nn.Module:
    network = net()
    changed = change(network[3])
    network[3] = network[3] if changed is None else changed
    return network


def lazy() -> nn.Module:
    network = net()
    network[3], network[7] = nn.LazyConv2d(12, 3), nn.LazyLinear(5)
    return network


def scripted_block() -> nn.Module:
    network = net()
    network[3] = torch.jit.script(nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU()))
    return network


def features_in_parallel() -> nn.Module:
    """The layers before the classifier in parallel, as in torch's old ImageNet example."""
    layers = net()
    return nn.Sequential(nn.DataParallel(layers[:5]), *layers[5:])


def computed_by_a_hook(layer: nn.Module) -> None:
    layer.scale = nn.Parameter(layer.weight.detach().clone())
    del layer._parameters["weight"]

    def hook(module: nn.Module, args: object) -> None:
        module.weight = module.scale.tanh()

    layer.register_forward_pre_hook(hook)
    hook(layer, ())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.fixture(autouse=True)
def without_deprecations() -> Iterator[None]:
    """Old ways are what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


STUDENTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "data parallel": (
        lambda: nn.DataParallel(net()),
        r"^the network \(DataParallel\) .*\.module.*--trainer\.devices",
    ),
    "parallel inside": (features_in_parallel, r"^0 \(DataParallel\) .*\.module"),
    "scripted": (lambda: torch.jit.script(net()), r"^the network .*TorchScript.*scripted"),
    "traced": (lambda: torch.jit.trace(net(), SAMPLE), r"^the network .*TorchScript.*traced"),
    "scripted block": (scripted_block, r"^3 \(RecursiveScriptModule\) .*TorchScript"),
    "compiled": (
        lambda: torch.compile(net()),
        r"^the network \(OptimizedModule\) .*torch\.compile.*_orig_mod",
    ),
    "compiled block": (lambda: with_layer(torch.compile), r"^3 \(OptimizedModule\) .*_orig_mod"),
    "lazy": (lazy, r"^3 \(LazyConv2d\) .*run the student once on a batch"),
    "old weight norm": (
        lambda: with_layer(weight_norm),
        r"^3 \(Conv2d\) .*WeightNorm.*torch\.nn\.utils\.remove_weight_norm",
    ),
    "old spectral norm": (
        lambda: with_layer(spectral_norm),
        r"^3 \(Conv2d\) .*SpectralNorm.*torch\.nn\.utils\.remove_spectral_norm",
    ),
    "pruned": (
        lambda: with_layer(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        r"^3 \(Conv2d\) .*L1Unstructured.*torch\.nn\.utils\.prune\.remove",
    ),
    "pruned twice": (
        lambda: with_layer(
            lambda layer: [prune.random_unstructured(layer, "bias", 0.5) for _ in range(2)] and None
        ),
        r"^3 \(Conv2d\) .*PruningContainer.*torch\.nn\.utils\.prune\.remove",
    ),
    "hook": (lambda: with_layer(computed_by_a_hook), r"^3 \(Conv2d\) .*not a parameter.*hook"),
    "weight norm": (
        lambda: with_layer(parametrizations.weight_norm),
        r"^3 \(ParametrizedConv2d\) .*weight .*_WeightNorm.*remove_parametrizations",
    ),
    "spectral norm": (
        lambda: with_layer(parametrizations.spectral_norm),
        r"^3 \(ParametrizedConv2d\) .*_SpectralNorm.*remove_parametrizations",
    ),
    "parametrized bias": (
        lambda: with_layer(
            lambda layer: parametrize.register_parametrization(layer, "bias", Doubled())
        ),
        r"^3 \(ParametrizedConv2d\) .*bias .*Doubled.*remove_parametrizations",
    ),
    "recurrent": (
        lambda: nn.Sequential(net()[:5], nn.Flatten(2), nn.LSTM(144, 5)),
        r"^2 \(LSTM\) .*without recurrent layers",
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_the_refusal_names_the_module_and_the_remedy(name: str) -> None:
    build, sentence = STUDENTS[name]
    with pytest.raises(ExpansionError, match=sentence) as refusal:
        expand(build(), sample=SAMPLE)
    message = str(refusal.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 300


def test_a_parametrized_layer_is_refused_where_it_would_stay_narrow_as_well() -> None:
    student = STUDENTS["spectral norm"][0]()
    with pytest.raises(ExpansionError, match="remove_parametrizations"):
        expand(student, sample=SAMPLE, exclude=["0"])


def test_find_plan_refuses_them_as_well() -> None:
    with pytest.raises(ExpansionError, match="_orig_mod"):
        find_plan(torch.compile(net()), SAMPLE, 2)


def ran_once() -> nn.Module:
    network = lazy()
    network(SAMPLE)
    return network


def pruned_for_good() -> nn.Module:
    network = STUDENTS["pruned"][0]()
    prune.remove(network[3], "weight")
    return network


def normed_for_good(kind: str, remove: Callable[..., object]) -> nn.Module:
    network = STUDENTS[kind][0]()
    remove(network[3], *(["weight"] if remove is parametrize.remove_parametrizations else []))
    return network


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.DataParallel(net()).module,
        lambda: torch.compile(net())._orig_mod,
        ran_once,
        pruned_for_good,
        lambda: normed_for_good("old weight norm", torch.nn.utils.remove_weight_norm),
        lambda: normed_for_good("weight norm", parametrize.remove_parametrizations),
        lambda: normed_for_good("spectral norm", parametrize.remove_parametrizations),
    ],
    ids=["parallel", "compiled", "lazy", "pruned", "old_weight", "weight", "spectral"],
)
def test_the_remedies_help(build: Callable[[], nn.Module]) -> None:
    assert_exact(build(), torch.randn(4, 3, 16, 16, dtype=torch.float64))


def test_the_remedy_for_old_spectral_norm_helps() -> None:
    student = normed_for_good("old spectral norm", torch.nn.utils.remove_spectral_norm)
    # Torch leaves a hook behind, under which such a layer loads no weights: none are loaded here.
    extracted = expand(student.double(), sample=SAMPLE).extract()
    x = SAMPLE.double()
    assert torch.equal(extracted(x), student(x))


def test_a_network_compiled_in_place_is_expanded() -> None:
    network = net()
    network.compile()
    pair = expand(network, sample=SAMPLE)
    assert pair.teacher.get_submodule("0").out_channels == 16
