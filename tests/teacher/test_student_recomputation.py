import random
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks.centred import Centred
from gpd_cli import expand
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.pair import Pair


def make_pair(recompute: bool, dropout: float = 0.0) -> Pair:
    torch.manual_seed(0)
    size = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
    student = timm.create_model("resnet18", num_classes=10, drop_rate=dropout, **size)
    pair = expand(student.double(), sample=torch.zeros(2, 3, 32, 32), branches=["1x1"]).train()
    pair.recompute_student = recompute
    return pair


def loss_of(logits: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    student, teacher = logits
    gap = F.cross_entropy(student, teacher.detach().softmax(1))
    return F.cross_entropy(student, labels) + F.cross_entropy(teacher, labels) + gap


def assert_same_gradients_and_buffers(one: Pair, other: Pair) -> dict[str, Tensor]:
    """Compare two pairs after the same steps; the buffers of the first."""
    parameters = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-12)
    buffers, others = dict(one.named_buffers()), dict(other.named_buffers())
    for name, buffer in buffers.items():
        assert torch.equal(buffer, others[name]), name
    return buffers


def test_a_recomputed_student_has_the_same_gradients_and_statistics() -> None:
    images, labels = torch.randn(4, 3, 32, 32).double(), torch.tensor([1, 2, 3, 4])
    pairs = [make_pair(False, 0.2), make_pair(True, 0.2)]
    for pair in pairs:
        torch.manual_seed(1)
        # Dropout in both networks, which run in another order: the same draws for each of them.
        for network in (pair.teacher, pair.narrow):
            network.register_forward_pre_hook(lambda *_: torch.manual_seed(2) and None)
        for _ in range(2):
            loss_of(pair(images), labels).backward()
    assert_same_gradients_and_buffers(*pairs)
    assert int(pairs[1].narrow.bn1.num_batches_tracked) == 2


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.classifier = Centred(3, 4), nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.stem(images).mean((2, 3)))


def test_the_second_run_begins_from_the_buffers_of_the_first() -> None:
    images, labels = torch.randn(4, 3, 8, 8).double() + 1, torch.tensor([1, 2, 3, 4])
    pairs = []
    for recompute in (False, True):
        torch.manual_seed(0)
        pair = expand(Student().double(), sample=images, branches=1).train()
        pair.recompute_student = recompute
        for _ in range(2):
            loss_of(pair(images), labels).backward()
        pairs.append(pair)
    buffers = assert_same_gradients_and_buffers(*pairs)
    assert buffers["narrow.stem.centre"].all()


DRAWS: dict[str, Callable[[], float]] = {
    "python": lambda: random.random(),
    "numpy": lambda: float(np.random.random()),
    "torch": lambda: float(torch.rand(())),
}


class Drawing(Student):
    """Scales its features by a number that it draws while it trains."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).mean((2, 3))
        return self.classifier(features * (self.draw() if self.training else 0.5))


@pytest.mark.parametrize("name", DRAWS)
def test_the_second_run_draws_what_the_first_one_drew(name: str) -> None:
    images, labels = torch.randn(4, 3, 8, 8).double() + 1, torch.tensor([1, 2, 3, 4])
    student = Drawing(DRAWS[name]).double()
    one, other = (expand(student, sample=images, branches=1).train() for _ in range(2))
    other.recompute_student = True
    seed()
    F.cross_entropy(one.student(images), labels).backward()
    seed()
    logits, _ = other(images)  # the student first
    third = drawn_and_put_back(name)
    F.cross_entropy(logits, labels).backward()
    gradients = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
    for key, gradient in gradients.items():
        torch.testing.assert_close(other.get_parameter(key).grad, gradient, rtol=1e-9, atol=1e-12)
    assert DRAWS[name]() == third  # the second run leaves the generators alone


def seed() -> None:
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)


def drawn_and_put_back(name: str) -> float:
    """The number that would be drawn next."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = DRAWS[name]()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return number


def kept(network: nn.Module, images: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights aside."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if len(tensor.shape) == 4 and len(tensor) == len(images):  # activations
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _outputs = network(images)  # which hold what is kept
    return sum(sizes.values())


def test_a_recomputed_student_keeps_no_activations() -> None:
    images = torch.randn(8, 3, 32, 32).double()
    wide = kept(merged_teacher(make_pair(False)).train(), images)
    assert kept(make_pair(False), images) > 1.3 * wide
    assert kept(make_pair(True), images) < 1.05 * wide
