"""In the fidelity settings a step of ours is one of the paper's authors' (guoyongcs/GPD).

Beside `gpd_cli` stands a plain implementation of what their code computes, written for this test:
wide activations at 1/r of the student's, kernels and biases divided by r, copies end to end, and a
student that runs on the first block of every stored tensor, times r.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli import Pair, expand
from gpd_cli.distill.objective import Objective
from gpd_cli.teacher.authors_kernel import AuthorsKernel
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.widening.running.randomize import randomize

RATIO, CLASSES = 2, 5
WIDTHS = {"stem": (4, 3), "plain": (6, 4), "depthwise": (6, 1), "point": (8, 6)}  # (O, I / g)
BRANCHED = ("plain", "depthwise")
SCRATCH = (0.25, 0.25, 0.0, 0.5, 0.05, 0.5)
FINE_TUNING = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
FACTORS = {  # ours by their place in the authors' list; the first is the main kernel
    "avg": ("1x1_avg", "weight"),
    "prior": ("frequency", "weight"),
    "first": ("1x1_kxk", "deviation"),
    "second": ("1x1_kxk", "weight"),
    "twin": ("kxk_2", "weight"),
    "dw": ("depthwise_separable", "depthwise"),
    "pw": ("depthwise_separable", "weight"),
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=1e-2),
}


class Student(nn.Module):
    """Every kind of layer that the authors treat in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.point = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(self.bn2(self.plain(x)))
        x = F.relu(self.bn3(self.depthwise(x)))
        return self.fc(F.relu(self.point(x)).mean((2, 3)))


def tile(tensor: Tensor, *times: int) -> Tensor:
    """Copies end to end."""
    return tensor.repeat(*times, *[1] * (tensor.ndim - len(times)))


def prior(channels: int) -> Tensor:
    """Their fixed filters, ``[O, 3, 3]``; some are zero."""
    filters = torch.zeros(channels, 3, 3, dtype=torch.float64)
    for c in range(channels):
        for y in range(3):
            for x in range(3):
                place, number = (y, c + 1) if c < channels / 2 else (x, c + 1 - channels / 2)
                filters[c, y, x] = math.cos(math.pi * (place + 0.5) * number / 3)
    return filters


class Authors:
    """Their dynamic teacher, expanded without noise from a student's weights.

    Args:
        weights: the student's state dict.
        factors: per branched layer, the student's branch weights.
        gates: initial values, in the order main, average, prior, 1x1-kxk, kxk, separable.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        factors: dict[str, dict[str, Tensor]],
        gates: tuple[float, ...],
    ) -> None:
        r, p = RATIO, {}
        for name, (o, i) in WIDTHS.items():
            w = weights[f"{name}.weight"]
            if i == 1:
                p[name] = tile(w, r)
            else:
                p[name] = tile(w / r, r, 1 if name == "stem" else r)
            for key, f in factors.get(name, {}).items():
                if key == "dw":
                    p[f"{name}.{key}"] = tile(f, r)
                else:
                    p[f"{name}.{key}"] = tile(f, r) if i == 1 else tile(f / r, r, r)
            if name in factors:
                p[f"{name}.gates"] = torch.tensor(gates, dtype=torch.float64)[:, None].repeat(
                    1, r * o
                )
        p["point.bias"] = tile(weights["point.bias"] / r, r)
        for bn in ("bn1", "bn2", "bn3"):
            p[f"{bn}.weight"] = tile(weights[f"{bn}.weight"], r)
            p[f"{bn}.bias"] = tile(weights[f"{bn}.bias"], r)
        p["fc"], p["fc.bias"] = tile(weights["fc.weight"], 1, r), weights["fc.bias"].clone()
        self.parameters = {key: value.clone().requires_grad_() for key, value in p.items()}

    def kernel(self, name: str, narrow: bool) -> Tensor:
        """What one network convolves with: the wide kernel, or the student's."""
        o, i = WIDTHS[name]
        dense = i > 1
        width = 1 if narrow else RATIO
        scale = RATIO if narrow and dense else 1
        inputs = i if name == "stem" or not dense else i * width

        def cut(key: str, *sizes: int, by: int = scale) -> Tensor:
            return self.parameters[key][tuple(slice(n) for n in sizes)] * by

        outputs = o * width
        main = cut(name, outputs, inputs)
        if f"{name}.gates" not in self.parameters:
            return main
        channels = inputs if dense else outputs
        avg = cut(f"{name}.avg", outputs, inputs).expand(-1, -1, 3, 3) / 9
        frequency = cut(f"{name}.prior", outputs, inputs) * tile(prior(o), width)[:, None]
        eye = tile(torch.eye(i).double() / RATIO, RATIO, RATIO) if dense else tile(torch.ones(o), 2)
        eye = eye.view(-1, i * RATIO if dense else 1)[:channels, :inputs] * scale
        first = cut(f"{name}.first", channels, inputs).flatten(1) + eye
        second = cut(f"{name}.second", outputs, inputs)
        twin = cut(f"{name}.twin", outputs, inputs)
        dw = cut(f"{name}.dw", channels, by=1)
        pw = cut(f"{name}.pw", outputs, inputs * 8).view(outputs, inputs, 8)
        if dense:
            product = torch.einsum("ti,othw->oihw", first, second)
            separable = torch.einsum("imhw,oim->oihw", dw, pw)
        else:
            product = first[:, :, None, None] * second
            separable = torch.einsum("omhw,oim->oihw", dw, pw)
        gates = self.parameters[f"{name}.gates"][:, :outputs, None, None, None]
        branches = (main, avg, frequency, product, twin, separable)
        return sum(gate * branch for gate, branch in zip(gates, branches, strict=True))

    def logits(self, x: Tensor, narrow: bool) -> Tensor:
        """Of the student, or of the teacher, whose activations are 1 / r of what they mean."""
        p, width, scale = self.parameters, 1 if narrow else RATIO, 1 if narrow else RATIO
        for name, bn in (("stem", "bn1"), ("plain", "bn2"), ("depthwise", "bn3")):
            o, i = WIDTHS[name]
            groups = o * width if i == 1 else 1
            stride = 2 if name == "stem" else 1
            x = F.conv2d(x, self.kernel(name, narrow), None, stride, 1, groups=groups)
            affine = (p[f"{bn}.{key}"][: o * width] for key in ("weight", "bias"))
            x = F.batch_norm(x * scale, None, None, *affine, training=True) / scale
            x = F.relu(x)
        bias = p["point.bias"][: 8 * width] * (RATIO if narrow else 1)
        x = F.relu(F.conv2d(x, self.kernel("point", narrow), bias))
        return F.linear(x.mean((2, 3)), p["fc"][:, : 8 * width], p["fc.bias"])

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of both networks; the student's targets are the teacher's, smoothed, at three times."""
        wide, narrow = self.logits(x, False), self.logits(x, True)
        log_p = F.log_softmax(narrow, 1)
        soft = -(wide.detach().softmax(1) * log_p).sum(1)
        gap = 0.9 * soft + 0.1 * -log_p.mean(1)
        return F.cross_entropy(wide, y) + F.cross_entropy(narrow, y) + 3 * gap.mean()

    def state(self, narrow: bool) -> dict[str, Tensor]:
        """Weights of a plain network that computes the same; of the teacher, its copies end to
        end and its activations at full size."""
        p, width = self.parameters, 1 if narrow else RATIO
        state = {f"{name}.weight": self.kernel(name, narrow) for name in WIDTHS}
        if not narrow:
            state["stem.weight"] = state["stem.weight"] * RATIO
        for bn, o in (("bn1", 4), ("bn2", 6), ("bn3", 6)):
            state |= {f"{bn}.{key}": p[f"{bn}.{key}"][: o * width] for key in ("weight", "bias")}
        state["point.bias"] = p["point.bias"][: 8 * width] * RATIO
        state["fc.weight"] = p["fc"][:, : 8 * width] / width
        return state | {"fc.bias": p["fc.bias"]}


def end_to_end(wide: dict[str, Tensor]) -> dict[str, Tensor]:
    """A wide state whose copies lie side by side, with its copies end to end."""

    def order(size: int) -> Tensor:
        return torch.arange(size).view(-1, RATIO).T.flatten()

    state = {}
    for key, tensor in wide.items():
        if tensor.ndim and not key.startswith("fc."):
            tensor = tensor[order(len(tensor))]
        if key in ("plain.weight", "point.weight", "fc.weight"):
            tensor = tensor[:, order(tensor.shape[1])]
        state[key] = tensor
    return state


def factors_of(pair: Pair) -> dict[str, dict[str, Tensor]]:
    """The student's branch weights, which are drawn at random, of each branched layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for layer in BRANCHED:
        kernel = pair.teacher.get_submodule(layer).parametrizations.weight[0]
        if not isinstance(kernel, AuthorsKernel):
            return {}
        found[layer] = {
            key: kernel.factors[name][part](kernel.branches.weights[name][part])[1].detach()
            for key, (name, part) in FACTORS.items()
        }
    return found


@pytest.mark.parametrize(
    ("branches", "init", "gates"),
    [(1, "zero", ()), (6, "gpd", SCRATCH), ("gpd", "zero", FINE_TUNING)],
    ids=["width alone", "scratch", "fine-tuning"],
)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_our_steps_are_the_authors(branches, init, gates, optimizer_name) -> None:
    torch.manual_seed(0)
    student = Student().double()
    randomize(student, torch.Generator().manual_seed(1))
    images = torch.randn(3, 16, 3, 8, 8, dtype=torch.float64)
    labels = torch.randint(CLASSES, (3, 16))
    pair = expand(
        student,
        sample=images[0],
        ratio=RATIO,
        branches=branches,
        branch_init=init,
        branch_layers="3x3_stride1",
        storage="teacher",
        noise=0,
    ).train()
    theirs = Authors(student.state_dict(), factors_of(pair) if gates else {}, gates)
    optimizer = OPTIMIZERS[optimizer_name](pair.parameters())
    their_optimizer = OPTIMIZERS[optimizer_name](theirs.parameters.values())
    start = pair.extract().state_dict()
    for x, y in zip(images, labels, strict=True):
        narrow, wide = pair(x)
        torch.testing.assert_close(narrow, theirs.logits(x, True), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(wide, theirs.logits(x, False), rtol=1e-9, atol=1e-11)
        objective = Objective(gap_weight=3.0, gap_smoothing=0.1)
        loss = sum(objective.terms(narrow, wide, y).values())
        their_loss = theirs.loss(x, y)
        torch.testing.assert_close(loss, their_loss, rtol=1e-12, atol=0)
        optimizer.zero_grad()
        their_optimizer.zero_grad()
        loss.backward()
        their_loss.backward()
        optimizer.step()
        their_optimizer.step()
        teacher = end_to_end(merged_teacher(pair).state_dict())
        for is_student, state in ((True, pair.extract().state_dict()), (False, teacher)):
            for key, expected in theirs.state(is_student).items():
                torch.testing.assert_close(state[key], expected, rtol=1e-9, atol=1e-11)
    for key, tensor in pair.extract().state_dict().items():
        assert (tensor - start[key]).abs().max() > 1e-3, key


@pytest.mark.parametrize(
    ("optimizer", "faster"), [(torch.optim.SGD, RATIO**2), (torch.optim.AdamW, RATIO)]
)
def test_at_the_teachers_scale_a_step_moves_the_student_further_than_alone(
    optimizer: Callable[..., torch.optim.Optimizer], faster: int
) -> None:
    torch.manual_seed(0)
    student = Student().double()
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    pair = expand(student, sample=images, ratio=RATIO, branches=1, storage="teacher", noise=0)
    changes = []
    for network in (pair.train(), student.train()):
        before = student_weights(network)
        step = optimizer(network.parameters(), lr=1e-4, weight_decay=0)
        outputs = network(images)
        logits = outputs[0] if network is pair else outputs
        logits.square().mean().backward()
        step.step()
        after = student_weights(network)
        changes.append({key: after[key] - before[key] for key in before})
    for key in ("plain.weight", "point.weight", "point.bias"):
        ratio = (changes[0][key] / changes[1][key]).flatten()
        assert ratio.median() == pytest.approx(faster, rel=0.01), key


def student_weights(network: nn.Module) -> dict[str, Tensor]:
    """Kernels and biases of the student, of a pair or alone."""
    student = network.extract() if isinstance(network, Pair) else network
    return {key: value.detach().clone() for key, value in student.named_parameters()}
