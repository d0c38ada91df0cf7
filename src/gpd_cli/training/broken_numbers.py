"""What a run does about training steps whose loss or gradients are NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from gpd_cli.distributed.last_checkpoint import written_checkpoint
from gpd_cli.distributed.resume_commands import resume_command
from gpd_cli.distributed.world import everywhere
from gpd_cli.errors import DataError, DivergenceError
from gpd_cli.files import check_whole, short_path
from gpd_cli.models import with_versions
from gpd_cli.teacher.checkpoint import TRAINED
from gpd_cli.training.averages import find_averager
from gpd_cli.training.resuming import keep_settings
from gpd_cli.training.watch import StepWatch, overflowing

OnNan = Literal["stop", "reduce_lr"]
FACTOR = 0.5
_MOST_REDUCTIONS = 8
_HALVINGS = 20  # steps in a row that a float16 run may leave out until the loss scale is low enough
_LARGEST_HALF = 65504.0


def are_lost(network: nn.Module, images: Tensor) -> bool:
    """Whether the networks, in eval mode, have no finite logits for any image.

    If so, the weights are finite but useless, and leaving out steps will not mend them. Eval mode
    is needed since in train mode the images of a batch share its statistics, so that a single image
    may spoil the logits of all.

    Args:
        network: the networks that are trained; every module's train or eval mode is restored.
        images: a batch of images, ``[B, C, H, W]``; with fewer than two, the answer is False.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            logits = [found for found in network(images) if found is not None]
    finally:
        for module, mode in modes.items():
            module.training = mode
    rows = torch.stack([torch.isfinite(found).all(1) for found in logits]).all(0)
    return everywhere(~rows.any() & (len(images) > 1))


def handle_left_out_step(
    watch: StepWatch,
    trainer: Trainer,
    module: LightningModule,
    what: str,
    on_nan: OnNan,
    settings: Sequence[Mapping[str, Any]],
    lost: bool = False,
) -> bool:
    """Report a step that was left out; after too many in a row, stop or return to good weights.

    Args:
        watch: the watch that found the step.
        trainer: trainer of the run.
        module: the module that is trained.
        what: text that says what is wrong with the step.
        on_nan: what to do after too many such steps in a row.
        settings: the run's own settings of the optimizer's parameter groups.
        lost: whether the weights are useless (`are_lost`), so that more steps will not help.

    Returns:
        True if the run simply goes on. False if the weights of the last good checkpoint were
        loaded, and the caller has to reduce the learning rate.

    Raises:
        DataError: when the run has to stop because of images with NaN or infinite pixels.
        DivergenceError: when the run has to stop for another reason.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    most = watch.most if scaler is None else max(watch.most, _HALVINGS)
    if watch.in_a_row <= most and not lost:
        if scaler is None:
            rank_zero_info(f"step {trainer.global_step + 1} is left out: {what}")
        return True
    why = f"the loss or a gradient was NaN or infinite in {watch.in_a_row} steps in a row"
    if not watch.is_suspicious:
        raise DataError(
            f"Training stopped: {what}; {why}; repair or remove these images"
            f"{_what_is_kept(trainer)}"
        )
    last = written_checkpoint(trainer)
    if on_nan == "reduce_lr" and last is not None:
        _take_back(last, trainer, module, settings)
        watch.in_a_row = 0
        return False
    large = overflowing(watch.network, _LARGEST_HALF) if scaler is not None else []
    if large:
        what += f"; merged kernels are too large for float16 ({', '.join(large[:3])})"
    if lost:
        why = "the weights now give NaN or infinite logits for every image"
    raise DivergenceError(f"Training diverged: {what}; {why}; {remedy(trainer, on_nan)}")


def reduced(factor: float, trainer: Trainer) -> float:
    """Reduce the factor of the learning rate.

    Args:
        factor: the factor so far.
        trainer: trainer of the run.

    Returns:
        The new factor, half of the present one.

    Raises:
        DivergenceError: when the learning rate has been reduced too often already.
    """
    if factor <= FACTOR**_MOST_REDUCTIONS:
        raise DivergenceError(
            f"Training diverged again at {factor:g} times the learning rate; check the data, or "
            f"{remedy(trainer, 'reduce_lr')}"
        )
    rank_zero_info(
        f"From now on the learning rate is {factor * FACTOR:g} times that of the schedule."
    )
    return factor * FACTOR


def remedy(trainer: Trainer, on_nan: OnNan) -> str:
    """The advice in error messages about NaN or infinite numbers, and what is not lost.

    Args:
        trainer: trainer of the run.
        on_nan: what the run does about such numbers.
    """
    further = "" if on_nan == "reduce_lr" else ", or set --model.on_nan reduce_lr"
    return (
        "lower --model.optimizer.lr, clip gradients with --trainer.gradient_clip_val 5, or train "
        f"in 32-bit precision{further}{_what_is_kept(trainer)}"
    )


def _what_is_kept(trainer: Trainer) -> str:
    """The end of error messages that stop a run: the checkpoint to go on from, if there is one."""
    last = written_checkpoint(trainer)
    if last is None:
        return "."
    path, command = short_path(last), resume_command(last)
    return f" (the last good checkpoint is {path}; go on with: {command})."


def _take_back(
    path: Path,
    trainer: Trainer,
    module: LightningModule,
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Restore networks, average and state of the optimizer from a checkpoint.

    Args:
        path: the checkpoint.
        trainer: trainer of the run.
        module: the module that is trained.
        settings: the run's own settings of the optimizer's parameter groups, which stay, as do the
            present learning rates.
    """
    check_whole(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    trained = content.get(TRAINED, content["state_dict"])
    module.load_state_dict(with_versions(trained, module))
    averager = find_averager(trainer)
    if averager is not None and TRAINED in content:
        model: Any = averager._average_model
        model.module.load_state_dict(with_versions(content["state_dict"], model.module))
        model.n_averaged.copy_(content["averaging_state"]["n_averaged"])
    for optimizer, state in zip(trainer.optimizers, content["optimizer_states"], strict=True):
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        keep_settings(optimizer, settings)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    rank_zero_info(f"The weights were restored from {short_path(path)}.")
