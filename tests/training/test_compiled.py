"""What `--model.compile` makes of a joint step: how many graphs, and how often they are made."""

import json
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch._dynamo.utils import counters

from gpd_cli import expand
from gpd_cli.__main__ import main
from gpd_cli.branches import BranchBank, branch_names
from gpd_cli.distill.objective import Objective
from gpd_cli.models import create_model
from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.unshared import without_sharing
from gpd_cli.training.speed import Speed

EPOCHS = 3


class Graphs(Callback):
    """Writes how many graphs there are at the end of each epoch, and what broke them."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_train_epoch_end(self, *_: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])

    def on_train_end(self, *_: Any) -> None:
        found = {"graphs": self.graphs, "breaks": list(counters["graph_break"])}
        Path("graphs.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_a_joint_step_is_two_graphs_that_are_made_in_the_first_epoch(tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    with chdir(tmp_path):
        code = main(
            [
                *("fit", "--model.student", "cifar_resnet8", "--model.num_classes", "10"),
                *("--model.student_args", "{in_chans: 1}", "--model.branches", "6"),
                *("--model.compile", "aot_eager", "--model.gap_warmup_epochs", "3"),
                *("--data.image_size", "16", "--data.batch_size", "16"),
                *("--trainer.accelerator", "cpu", "--trainer.max_epochs", str(EPOCHS)),
                *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
                *("--trainer.callbacks+=test_compiled.Graphs",),
            ]
        )
    assert code == 0
    found = json.loads((tmp_path / "graphs.json").read_text())
    # Merging with both networks, and the losses; what is validated are extracted networks.
    assert found["graphs"] == [2] * EPOCHS
    assert found["breaks"] == []


def trained(backend: str | None, recompute: bool, own: str = "nothing") -> dict[str, Tensor]:
    """The state of a small pair after two steps."""
    torch.manual_seed(0)
    student = create_model("cifar_resnet8", num_classes=10)
    pair = expand(student.double(), sample=torch.zeros(2, 3, 16, 16), branches=2).train()
    pair = without_sharing(pair, own != "weights", own == "nothing")
    pair.recompute_student = recompute
    for kernel in pair.modules():
        if isinstance(kernel, SharedKernel):
            kernel.averages_gradient = recompute  # as with several processes
    speed = Speed(compile=backend or False)
    speed.prepare(pair, None)
    losses = speed.compiled(Objective().losses)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    for _ in range(2):
        student_logits, teacher = pair(torch.randn(4, 3, 16, 16).double())
        terms = losses(student_logits, teacher, torch.randint(10, (4,)))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in pair.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("own", ["nothing", "norms", "weights"])
@pytest.mark.parametrize("recompute", [False, True], ids=["both_at_once", "recomputed"])
def test_compiled_steps_are_the_same_steps(recompute: bool, own: str) -> None:
    plain, compiled = (trained(backend, recompute, own) for backend in (None, "aot_eager"))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_compiled_merging_has_the_precision_of_the_plain_one() -> None:
    torch.manual_seed(0)
    bank = BranchBank((8, 4, 3, 3), 1, branch_names(6))
    for gate in bank.gates.values():
        torch.nn.init.constant_(gate, 0.3)
    kernel, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)

    def merged(merge: Callable[[Tensor], Tensor]) -> list[Tensor]:
        bank.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            result = merge(kernel)
        result.backward(gradient)
        return [result.detach(), *(p.grad for p in bank.parameters() if p.grad is not None)]

    plain, compiled = merged(bank), merged(torch.compile(bank.forward, backend="aot_eager"))
    assert len(plain) == len(compiled) == 1 + len(list(bank.parameters()))
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
