"""A pair whose networks run parts of them again in the backward pass (gradient checkpointing)."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks.centred import Centred
from gpd_cli import expand
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair
from gpd_cli.teacher.unshared import without_sharing

NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    "resnet": ("test_resnet", {"drop_path_rate": 0.3}),
}
IMAGES = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def student(name: str, runs_again: bool) -> nn.Module:
    torch.manual_seed(0)
    model, options = NETWORKS[name]
    network = timm.create_model(model, num_classes=5, **options).double()
    network.set_grad_checkpointing(runs_again)
    return network


def pair_of(name: str, runs_again: bool) -> Pair:
    network = student(name, runs_again)
    pair = expand(network, sample=torch.zeros(2, 3, 32, 32), branches=3).train()
    for parameter, value in pair.named_parameters():
        if ".gates." in parameter:
            nn.init.constant_(value, 0.3)
    return pair


def loss_of(logits: tuple[Tensor, Tensor | None]) -> Tensor:
    found = [one for one in logits if one is not None]
    return torch.stack([one.log_softmax(1)[:, 0].mean() for one in found]).sum()


def train(network: Pair | Alone, steps: int) -> dict[str, Tensor]:
    """Gradients of the first step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        loss_of(network(IMAGES)).backward()
        if not step:
            gradients = {n: p.grad.clone() for n, p in network.named_parameters()}
        optimizer.step()
    return gradients


@pytest.mark.parametrize("own", ["nothing", "norms", "weights"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_the_same_to_the_last_bit(name: str, own: str) -> None:
    pairs = [pair_of(name, runs_again) for runs_again in (False, True)]
    pairs = [without_sharing(pair, own != "weights", own == "nothing").train() for pair in pairs]
    once, again = (train(pair, 3) for pair in pairs)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)
    states = [pair.state_dict() for pair in pairs]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    first, second = (pair.eval().extract()(IMAGES) for pair in pairs)
    assert torch.equal(first, second)


def test_a_student_alone_counts_its_images_once() -> None:
    networks = [Alone(student("resnet", runs_again)).train() for runs_again in (False, True)]
    networks[1].runs_again = True
    for network in networks:
        train(network, 2)
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


class Blocks(nn.Module):
    """Blocks with buffers of their own and one that all of them read."""

    def __init__(self, runs_again: bool) -> None:
        super().__init__()
        self.runs_again = runs_again
        self.first, self.second = Centred(3, 4), Centred(4, 4)
        self.classifier = nn.Linear(4, 5)
        self.register_buffer("level", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.level.lerp_(images.mean() + 1, 0.5)
        for block in (self.first, self.second):
            images = self.run(lambda images, block=block: block(images) * self.level, images)
        return self.classifier(images.mean((2, 3)))

    def run(self, block: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        return checkpoint(block, images, use_reentrant=False) if self.runs_again else block(images)


@pytest.mark.parametrize("kind", ["pair", "alone"])
def test_parts_begin_again_from_the_buffers_of_their_first_run(kind: str) -> None:
    networks: list[Pair | Alone] = []
    for runs_again in (False, True):
        torch.manual_seed(0)
        student = Blocks(runs_again).double()
        if kind == "pair":
            networks.append(expand(student, sample=IMAGES, branches=1).train())
        else:
            networks.append(Alone(student).train())
            networks[-1].runs_again = runs_again
    once, again = (train(network, 3) for network in networks)
    assert all(torch.equal(once[name], again[name]) for name in once)
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not any(module._forward_pre_hooks for module in networks[1].modules())


class Shared(Blocks):
    """Runs one block twice."""

    def __init__(self, runs_again: bool) -> None:
        super().__init__(runs_again)
        self.first = nn.Conv2d(3, 4, 1)
        self.second = Centred(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        images = self.first(images)
        for _ in range(2):
            images = self.run(self.second, images)
        return self.classifier(images.mean((2, 3)))


def test_a_block_that_ran_twice_begins_again_from_what_it_had_each_time() -> None:
    gradients = []
    for runs_again in (False, True):
        torch.manual_seed(0)
        network = Alone(Shared(runs_again).double()).train()
        network.runs_again = runs_again
        gradients.append(train(network, 2))
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_the_teacher_alone_runs_on_its_weights_of_now() -> None:
    pair = pair_of("vit", True)
    pair(IMAGES)  # without a backward pass
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.mul_(0.5)
    expected = copy.deepcopy(pair.extract())(IMAGES), pair.eval().teacher(IMAGES)
    fresh = pair_of("vit", False)
    fresh.load_state_dict(pair.state_dict())
    assert torch.equal(fresh.eval().student(IMAGES), expected[0].detach())
    assert torch.equal(fresh.teacher(IMAGES), expected[1])


def test_no_graph_outlives_the_backward_pass() -> None:
    pair = pair_of("resnet", True)
    logits = pair(IMAGES)
    held = [m._held for m in pair.teacher.modules() if getattr(m, "_held", None) is not None]
    kernels = [weakref.ref(kernel) for kernel, _ in held]
    assert kernels
    del held
    loss_of(logits).backward()
    del logits
    gc.collect()
    assert not any(kernel() is not None for kernel in kernels)
    assert all("weight" not in vars(module) for module in pair.narrow.modules())
