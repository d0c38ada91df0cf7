"""Runs that go on by other settings than they were started with."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import list_optimizers
from torch import Tensor, nn

from gpd_cli.errors import GpdError, TrainingError
from gpd_cli.forms import FormError
from gpd_cli.training.optimizers import OptimizerSettings, make_optimizer
from gpd_cli.training.resuming import check_same_optimizer, group_settings, keep_settings
from gpd_cli.training.state_checks import check_optimizer_state
from processes import JOB, SLURM
from runs import ALONE, BATCHES, PAIRED, STOP, checkpoint, fit, logged, run_folder

EVERY = ["--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "1"]


def last(folder: Path, version: int = 0) -> list[str]:
    return ["--ckpt_path", str(run_folder(folder, version) / "checkpoints" / "last.ckpt")]


def rates(folder: Path, version: int = 0) -> dict[int, float]:
    """Learning rates by update."""
    return {int(row["step"]): float(row["lr"]) for row in logged(folder, version) if row.get("lr")}


def groups(folder: Path, version: int = 0) -> list[dict[str, Any]]:
    (state,) = checkpoint(folder, version=version)["optimizer_states"]
    return state["param_groups"]


def optimizer(**settings: Any) -> list[str]:
    return [x for name, v in settings.items() for x in (f"--model.optimizer.{name}", str(v))]


SHORT = optimizer(lr=0.02, weight_decay=1e-4, warmup_epochs=1)


@pytest.mark.parametrize(
    "now",
    [
        SHORT,
        optimizer(lr=0.5, weight_decay=0.01, momentum=0.5),
        optimizer(lr=0.5, min_lr=0.1, warmup_epochs=3),
        optimizer(lr=0.5, sched="step", sched_args="{decay_epochs: 3, decay_rate: 0.1}"),
        optimizer(lr=0.5, sched="none"),
    ],
    ids=["longer", "other settings", "other warm-up", "other schedule", "no schedule"],
)
def test_a_run_that_goes_on_follows_its_own_length_and_settings(
    tmp_path: Path, now: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert fit(parts, *ALONE, *EVERY, *SHORT, epochs=2) == 0
    assert fit(parts, *ALONE, *EVERY, *now, *last(parts), epochs=4) == 0
    assert fit(whole, *ALONE, *EVERY, *now, epochs=4) == 0
    expected = {step: rate for step, rate in rates(whole).items() if step >= 2 * BATCHES}
    assert len(expected) == 2 * BATCHES
    assert rates(parts, 1) == expected
    assert max(expected.values()) > 0
    assert groups(parts, 1) == groups(whole)
    told = checkpoint(parts, version=1)["hyper_parameters"]["optimizer"]
    assert told == checkpoint(whole)["hyper_parameters"]["optimizer"]


def test_a_run_that_goes_on_by_other_settings_keeps_the_momentum(tmp_path: Path) -> None:
    options = [*ALONE, "--data.no_aug", "true"]
    assert fit(tmp_path, *options, epochs=1) == 0
    resume = [*options, *last(tmp_path), "--trainer.limit_train_batches", "1"]
    assert fit(tmp_path, *resume, epochs=2) == 0
    assert fit(tmp_path, *resume, *optimizer(lr=0.5, sched="none"), epochs=2) == 0
    same, other = (checkpoint(tmp_path, version=k)["optimizer_states"][0] for k in (1, 2))
    assert [g["lr"] for g in same["param_groups"]] != [g["lr"] for g in other["param_groups"]]
    # One update on: the gradients are those of the same weights, the buffers before the same, too.
    for number, state in same["state"].items():
        assert torch.equal(state["momentum_buffer"], other["state"][number]["momentum_buffer"])


@pytest.mark.slow
def test_a_run_that_goes_on_twice_is_the_run_itself(tmp_path: Path) -> None:
    """The place in the schedule is handed on from run to run."""
    half = ["--trainer.limit_train_batches", "2"]
    assert fit(tmp_path, *ALONE, *EVERY, *STOP, "--trainer.limit_train_batches", "4", epochs=8) == 0
    assert fit(tmp_path, *ALONE, *EVERY, *half, *last(tmp_path), epochs=4) == 0
    assert fit(tmp_path, *ALONE, *EVERY, *half, *last(tmp_path, 1), epochs=8) == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    assert fit(whole, *ALONE, *EVERY, *half, epochs=8) == 0
    # Two epochs of four updates and two of two are behind the last run: 12 updates, 4 of 8 epochs.
    expected = {step + 4: rate for step, rate in rates(whole).items() if step >= 8}
    assert rates(tmp_path, 2) == pytest.approx(expected)


def test_a_length_in_steps_is_that_of_the_schedule(tmp_path: Path) -> None:
    steps = ["--trainer.max_steps", "8"]
    assert fit(tmp_path, *ALONE, *EVERY, *STOP, *steps, epochs=-1) == 0
    other = ["--trainer.limit_train_batches", "1"]
    assert fit(tmp_path, *ALONE, *EVERY, *steps, *other, *last(tmp_path), epochs=-1) == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    assert fit(whole, *ALONE, *EVERY, *steps, epochs=-1) == 0
    updates = [*rates(tmp_path).values(), *rates(tmp_path, 1).values()]
    assert updates == list(rates(whole).values())


def test_a_length_in_steps_that_ends_within_an_epoch(tmp_path: Path) -> None:
    """The last weights are scored, and a longer run goes on within the epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    steady = [*PAIRED, *EVERY, *optimizer(sched="none", warmup_epochs=0), "--trainer.max_steps"]
    assert fit(parts, *steady, str(BATCHES + 1), epochs=-1) == 0
    scored = [row for row in logged(parts) if row.get("val/student_top1")]
    assert [int(row["step"]) for row in scored] == [BATCHES - 1, BATCHES]
    trained = [row for row in logged(parts) if row.get("train/student_top1")]
    assert [int(row["step"]) for row in trained] == [BATCHES - 1, BATCHES]
    assert fit(parts, *steady, str(3 * BATCHES - 1), *last(parts), epochs=-1) == 0
    assert fit(whole, *steady, str(3 * BATCHES - 1), epochs=-1) == 0
    norms = [
        {int(row["step"]): row["grad_norm"] for row in rows if row.get("grad_norm")}
        for rows in (logged(parts, 1), logged(whole))
    ]
    assert norms[0].keys() == set(range(BATCHES + 1, 3 * BATCHES - 1))
    assert all(norms[1][step] == norm for step, norm in norms[0].items())
    kept, expected = checkpoint(parts, version=1)["state_dict"], checkpoint(whole)["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (optimizer(opt="adamw"), "sgd"),
        (optimizer(momentum=0), "momentum 0.9"),
        (optimizer(decay_all="true"), "decay_all false"),
    ],
)
def test_another_optimizer_is_refused_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], now: list[str], named: str
) -> None:
    assert fit(tmp_path, *ALONE, epochs=1) == 0
    capfd.readouterr()
    assert fit(tmp_path, *ALONE, *now, *last(tmp_path), epochs=2) == 1
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("gpd: error: The checkpoint's optimizer")
    assert named in error


def test_arguments_that_change_what_an_optimizer_remembers_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, *ALONE, *optimizer(opt="adamw"), epochs=1) == 0
    more = optimizer(opt="adamw", opt_args="{amsgrad: true}")
    assert fit(tmp_path, *ALONE, *more, *last(tmp_path), epochs=2) == 1
    assert "amsgrad" in capfd.readouterr().err.splitlines()[-1]
    others = optimizer(opt="adamw", opt_args="{betas: [0.8, 0.99]}")
    assert fit(tmp_path, *ALONE, *others, *last(tmp_path), epochs=2) == 0
    assert {tuple(group["betas"]) for group in groups(tmp_path, 1)} == {(0.8, 0.99)}


@pytest.mark.parametrize(
    ("length", "named"),
    [
        (["--trainer.max_epochs", "2"], "max_epochs is 2"),
        (["--trainer.max_epochs", "1"], "max_epochs is 1"),
        (["--trainer.max_steps", str(2 * BATCHES)], f"max_steps is {2 * BATCHES}"),
    ],
)
def test_a_finished_run_says_so_and_how_to_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], length: list[str], named: str
) -> None:
    assert fit(tmp_path, *PAIRED, epochs=2) == 0
    capfd.readouterr()
    assert fit(tmp_path, *PAIRED, *last(tmp_path), *length, epochs=9) == 1
    (error,) = capfd.readouterr().err.splitlines()
    assert "is finished" in error
    assert named in error
    assert not (run_folder(tmp_path, 1) / "config.yaml").exists()


def test_a_job_that_is_requeued_after_its_last_epoch_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert fit(tmp_path, *ALONE) == 0
    requeued = tmp_path / f"requeue_{JOB}_0.ckpt"
    requeued.symlink_to(run_folder(tmp_path) / "checkpoints" / "last.ckpt")
    assert fit(tmp_path, *ALONE) == 0
    assert not requeued.is_symlink()


@pytest.mark.parametrize(
    "opt",
    ["sgd", "adamw", "lamb", "adan", "lookahead_sgd", "muon", "novogradw", "lookahead_novograd"],
)
def test_counters_of_an_optimizer_go_on(opt: str) -> None:
    """Some keep the number of updates beside their settings, or one number for a whole weight."""
    settings = OptimizerSettings(opt=opt)
    images = torch.randn(8, 4)

    def train(network: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
        for _ in range(updates):
            optimizer.zero_grad()
            network(images).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    first = make_optimizer(network, settings, set())
    train(network, first, 5)
    other = nn.Linear(4, 4)
    other.load_state_dict(network.state_dict())
    second = make_optimizer(other, settings, set())
    own = group_settings(second)
    second.load_state_dict(deepcopy(first.state_dict()))
    check_optimizer_state(second)
    keep_settings(second, own)
    train(network, first, 4)
    train(other, second, 4)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert isinstance(a, Tensor)
        assert torch.equal(a, b)


@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("opt", ["sgd", "adamw", "lookahead_adamw"])
def test_what_an_optimizer_remembers_follows_the_weights_into_another_memory_format(
    opt: str, before: torch.memory_format
) -> None:
    settings = OptimizerSettings(opt=opt, lr=0.01, opt_args={"fused": True})
    images = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(0.1, 3, 6)[:, None, None]  # kernels with unequal gradients

    def train(network: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> None:
        for _ in range(updates):
            optimizer.zero_grad()
            (network(images) * scales).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    first = nn.Conv2d(4, 6, 3).to(memory_format=before)
    whole = make_optimizer(first, settings, set())
    train(first, whole, 3)
    switched = torch.channels_last if before is torch.contiguous_format else torch.contiguous_format
    second = nn.Conv2d(4, 6, 3).to(memory_format=switched)
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(second, settings, set())
    own = group_settings(resumed)
    resumed.load_state_dict(deepcopy(whole.state_dict()))
    keep_settings(resumed, own)
    train(first, whole, 6)
    train(second, resumed, 6)
    torch.testing.assert_close(second.weight, first.weight, rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_in_another_memory_format(tmp_path: Path) -> None:
    options = [*ALONE, "--data.no_aug", "true", *optimizer(lr=0.2, sched="none")]
    assert fit(tmp_path, *options, epochs=1) == 0
    assert fit(tmp_path, *options, *last(tmp_path), epochs=2) == 0
    switched = ["--model.channels_last", "true"]
    assert fit(tmp_path, *options, *last(tmp_path), *switched, epochs=2) == 0
    same, other = (checkpoint(tmp_path, version=k)["state_dict"] for k in (1, 2))
    kernels = [name for name, tensor in same.items() if tensor.ndim == 4]
    differences = [(other[name] - same[name]).norm() / same[name].norm() for name in kernels]
    assert max(differences) < 1e-4  # rounding; 0.04 where momentum comes from another element


TRAINING = [opt for opt in list_optimizers() if opt != "adahessian"]  # it takes other gradients
WITHOUT_EINSUM = "ignore:It is highly recommended to have 'opt_einsum'"


def after_a_step(opt: str, network: nn.Module, **arguments: Any) -> torch.optim.Optimizer:
    """An optimizer that has made a step."""
    try:
        made = make_optimizer(network, OptimizerSettings(opt=opt, opt_args=arguments), set())
    except GpdError as error:
        if "CUDA required" in str(error):
            pytest.skip(str(error))
        raise

    def closure() -> Tensor:
        made.zero_grad()
        loss: Tensor = network(torch.randn(4, 3, 4, 4)).square().mean()
        loss.backward()
        return loss

    closure()
    made.step(closure if "lbfgs" in opt else None)
    return made


def convolutions() -> nn.Module:
    """Weights of one, two and four axes, with long axes, of which some optimizers keep means."""
    layers = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Conv2d(20, 24, 1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(96, 18))


@pytest.mark.filterwarnings(WITHOUT_EINSUM)
@pytest.mark.parametrize("opt", TRAINING)
def test_the_state_of_each_optimizer_is_taken_up(opt: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # some compile their step, for minutes
        check_optimizer_state(after_a_step(opt, convolutions()))


@pytest.mark.filterwarnings(WITHOUT_EINSUM)
@pytest.mark.parametrize("end", [-1, 1])
def test_a_state_in_which_axes_of_kernels_are_laid_together_is_taken_up(end: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten())
    made = make_optimizer(
        network,
        OptimizerSettings(opt="kron", opt_args={"flatten": True, "flatten_end_dim": end}),
        set(),
    )
    state = made.state[network[0].weight]
    state["momentum_buffer"] = torch.zeros(2, 3, 4) if end == -1 else torch.zeros(2, 3, 2, 2)
    check_optimizer_state(made)
    state["momentum_buffer"] = torch.zeros(2, 3, 2, 2) if end == -1 else torch.zeros(2, 3, 4)
    with pytest.raises(FormError, match="momentum_buffer"):
        check_optimizer_state(made)


@pytest.mark.filterwarnings(WITHOUT_EINSUM)
@pytest.mark.parametrize(
    ("before", "now", "is_alike"),
    [
        ({"opt": "adam"}, {"opt": "adamw"}, True),
        ({"opt": "sgd"}, {"opt": "adamw"}, False),
        ({"opt": "adamw"}, {"opt": "novograd"}, False),  # of which one keeps a number per weight
        ({"opt": "kron"}, {"opt": "kron", "opt_args": {"flatten": True}}, False),
    ],
)
def test_an_optimizer_that_keeps_other_tensors_is_refused(
    before: dict[str, Any], now: dict[str, Any], is_alike: bool
) -> None:
    with torch.compiler.set_stance("force_eager"):
        if is_alike:
            check_same_optimizer(before, OptimizerSettings(**now))
            return
        with pytest.raises(TrainingError, match="keeps other state"):
            check_same_optimizer(before, OptimizerSettings(**now))


@pytest.mark.parametrize("name", ["exp_avg_sq_r", "exp_avg_sq_c"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (24, 2, 1, 1), (24, 20)])
def test_means_over_other_axes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    network = convolutions()
    made = after_a_step("adafactorbv", network)
    made.state[network[2].weight][name] = torch.zeros(shape)  # type: ignore[index]
    with pytest.raises(FormError, match=f"{name} of a weight"):
        check_optimizer_state(made)


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "novograd"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_state_of_another_shape_is_refused(opt: str, shape: tuple[int, ...]) -> None:
    network = nn.Linear(2, 2)
    made = make_optimizer(network, OptimizerSettings(opt=opt), set())
    network(torch.ones(1, 2)).sum().backward()
    made.step()
    states = getattr(made, "_base_optimizer", made).state
    name = "exp_avg" if opt == "novograd" else "exp_avg_sq"
    states[network.weight][name] = torch.zeros(shape)
    with pytest.raises(FormError, match=rf"{name} of a weight of shape \[2, 2\]"):
        check_optimizer_state(made)


@pytest.mark.parametrize(
    ("fused_before", "fused_now", "device"), [(False, True, "meta"), (True, False, "cpu")]
)
def test_counters_of_updates_lie_where_the_update_reads_them(
    fused_before: bool, fused_now: bool, device: str
) -> None:
    """The meta device stands for a GPU."""
    weight = nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0]["fused"] = fused_before
    counter = torch.tensor(5.0, device="meta" if fused_before else "cpu")
    optimizer.state[weight] = {"step": counter}
    if fused_before:  # numbers cannot come back from the meta device
        counter.cpu = lambda: torch.tensor(5.0)  # type: ignore[method-assign]
    keep_settings(optimizer, [{"fused": fused_now, "capturable": False}])
    placed = optimizer.state[weight]["step"]
    assert placed.device.type == device
    assert placed.dtype == torch.float32
