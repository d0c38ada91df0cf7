"""What an expansion promises, checked in one place: the same function, and the student back."""

import torch
from torch import Tensor, nn

from gpd_cli import Pair, expand
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.widening.running.double import in_double
from gpd_cli.widening.running.randomize import randomize


def assert_exact(student: nn.Module, x: Tensor, **options: object) -> Pair:
    """Expand a student under random weights and statistics, train the pair, and cut it out again.

    Args:
        student: the network; it is randomized, in float64.
        x: a batch, float64.
        options: of `expand`.

    Returns:
        The pair, trained for two steps.
    """
    student = student.double()
    randomize(student, torch.Generator().manual_seed(1))
    pair = expand(student, **{"sample": x[:2], "branches": 1, **options})
    for training in (False, True):
        with torch.no_grad(), in_double():
            expected = student.train(training)(x)
            narrow, wide = pair.train(training)(x)
        assert relative_difference(narrow, expected) < 1e-12
        assert relative_difference(wide, expected) < 1e-9
    before = {name: weight.clone() for name, weight in pair.extract().named_parameters()}
    optimizer = torch.optim.SGD(pair.parameters(), 1e-3)
    for _ in range(2):
        narrow, wide = pair(x)
        optimizer.zero_grad()
        (narrow.square().sum() + wide.square().sum()).backward()
        optimizer.step()
    extracted = pair.eval().extract().eval()
    student.eval().load_state_dict(extracted.state_dict(), strict=True)
    with torch.no_grad():
        expected = pair.student(x)
        for network in (extracted, student, lambda x: pair(x)[0]):
            assert torch.equal(network(x), expected)
    assert any(not torch.equal(p, before[n]) for n, p in extracted.named_parameters())
    return pair
