"""What a run of the student tells."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.record import record
from gpd_cli.widening.observe.recording import Recording


def recorded(network: nn.Module, *shape: int) -> Recording:
    return record(network.double().eval(), torch.randn(shape, dtype=torch.float64))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.norm(self.one(x)).relu())


def test_a_recording_tells_whose_outputs_go_where() -> None:
    pool = nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), Residual(), pool, nn.Flatten(), nn.Linear(6, 4))
    recording = recorded(network, 2, 3, 8, 8)
    assert recording.out_channels == {"0": 6, "1.one": 8, "1.two": 6, "4": 4}
    assert recording.in_channels == {"0": 3, "1.one": 6, "1.two": 8, "4": 6}
    assert recording.keeps_output == {"4"}
    assert recording.ends["1"] == {"0", "1.two"}
    assert recording.sums == [{"0", "1.two"}]
    assert [tuple(x.shape) for (x,) in recording.inputs["1.norm"]] == [(2, 8, 6, 6)]
    assert recording.layer_outputs.keys() == {"0", "1.one", "1.two", "4"}
    assert recording.output is not None
    assert not recording.output.requires_grad


class Direct(nn.Module):
    """Code that passes its own weight to a linear function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))
        self.heads = 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight, self.bias)
        return x.reshape(len(x), self.heads, -1).flatten(1)


def test_a_recording_tells_what_code_reads_and_does() -> None:
    recording = recorded(nn.Sequential(nn.Linear(3, 6), Direct(), nn.Linear(4, 3)), 2, 3)
    assert recording.direct == {"1.weight": "1.bias"}
    assert recording.out_channels["1.weight"] == 4
    reads = recording.reads["1"]
    assert reads.numbers == {"1.heads": 2}
    assert reads.tensors.keys() == {"1.weight", "1.bias"}
    (event,) = recording.events["1", 0]
    assert event.function == Tensor.reshape
    assert event.result == (2, 2, 2)
    split = Split(4, (2, 2), names=("heads", None))
    assert recording.splits == {"1.weight": [("1", split)]}
