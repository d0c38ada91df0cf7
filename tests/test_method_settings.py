"""Settings of methods: what they are checked for before anything is trained."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpd_cli.errors import MethodError
from gpd_cli.features import Outputs
from gpd_cli.methods import METHODS, Batch, Method, make_method
from gpd_cli.methods.dkd import DKD, dkd_loss
from gpd_cli.methods.kd import KD, kd_loss
from gpd_cli.methods.reviewkd import ReviewKD

NEEDED = {"crd": {"num_images": 8}}


class Plain(Method):
    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return network.logits.sum()


class Open(Plain):
    def __init__(self, scale: float = 1.0, **others: Any) -> None:
        super().__init__()
        self.scale, self.others = scale, others


@dataclass
class Options:
    scale: float = 1.0


class Composed(Plain):
    def __init__(
        self,
        options: Options | None = None,
        device: torch.device | None = None,
        sizes: tuple[int, ...] = (),
        several: list[Options] | None = None,
    ) -> None:
        super().__init__()
        self.options, self.device, self.sizes, self.several = options, device, sizes, several


class WithoutLoss(Method):
    pass


def test_numbers_written_as_text_are_numbers() -> None:
    pkt = make_method("pkt", {"weight": "3e4"})  # how YAML reads 3e4
    assert pkt.weight == 30000.0
    dkd = make_method("dkd", {"alpha": "1", "standardize": "false"})
    assert isinstance(dkd, DKD) and dkd.alpha == 1.0 and dkd.standardize is False


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("dkd", {"alpha": "much"}, "float"),
        ("kd", {"standardize": "maybe"}, "bool"),
        ("reviewkd", {"width": 256.5}, "int"),
        ("mlld", {"temperatures": 4.0}, "Sequence"),
        ("test_method_settings.Open", {"scale": [1]}, "float"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(
    name: str, settings: dict[str, Any], wanted: str
) -> None:
    (key,) = settings
    with pytest.raises(MethodError, match=rf"'{name}' does not take .* {key}: .*{wanted}"):
        make_method(name, settings)


def test_methods_of_ones_own() -> None:
    method = make_method("test_method_settings.Open", {"scale": "2", "further": "as it is"})
    assert isinstance(method, Open)
    assert method.scale == 2.0 and method.others == {"further": "as it is"}
    with pytest.raises(MethodError, match="no setting 'scale'; it takes none"):
        make_method("test_method_settings.Plain", {"scale": 1})
    with pytest.raises(MethodError, match="no forward"):
        make_method("test_method_settings.WithoutLoss")


def test_settings_of_other_types_are_handed_on_as_they_are() -> None:
    settings = {"options": {"scale": 2}, "device": "cpu", "sizes": ["3", 4]}
    settings["several"] = [{"scale": 1}]
    before = copy.deepcopy(settings)
    method = make_method("test_method_settings.Composed", settings)
    assert isinstance(method, Composed)
    assert method.options == {"scale": 2} and method.several == [{"scale": 1}]
    assert method.device == "cpu" and method.sizes == (3, 4)
    assert settings == before


WEIGHTS = {
    "at": ["weight"],
    "catkd": ["weight"],
    "cc": ["weight"],
    "crd": ["weight"],
    "dist": ["beta", "gamma"],
    "dkd": ["alpha", "beta"],
    "fitnets": ["weight"],
    "mlld": ["instance_weight", "batch_weight", "class_weight"],
    "nkd": ["gamma"],
    "pkt": ["weight"],
    "reviewkd": ["weight"],
    "rkd": ["distance_weight", "angle_weight"],
    "simkd": ["weight"],
    "srrl": ["feature_weight", "softmax_weight"],
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_weights_and_temperatures_out_of_range_are_refused(name: str) -> None:
    make_method(name, NEEDED.get(name))
    for key in WEIGHTS.get(name, ()):
        with pytest.raises(MethodError, match="0 or more, not -1"):
            make_method(name, {**NEEDED.get(name, {}), key: -1.0})


def test_losses_of_half_precision_are_computed_in_full() -> None:
    student, teacher = torch.randn(2, 4, 10).bfloat16()
    labels = torch.arange(4)
    for loss in (
        kd_loss(student, teacher, 2.0),
        dkd_loss(student, teacher, labels, 1.0, 2.0, 2.0),
        KD()(Outputs(student), Outputs(teacher), Batch(labels)),
    ):
        assert loss.dtype == torch.float32


def test_a_connector_of_a_whole_number_of_channels() -> None:
    method = make_method("reviewkd", {"width": "32"})
    assert isinstance(method, ReviewKD) and isinstance(method, nn.Module)
