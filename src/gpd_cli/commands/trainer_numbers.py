"""Range checks for options of the Trainer whose wrong values Lightning accepts at first.

Lightning would fail later, or ignore the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpd_cli.errors import TrainingError

_MOST_PROCESSES = 256  # largest number of processes on one machine

# For each option, its least value, and the meaning of a special value below that, if there is one.
_LEAST: dict[str, tuple[float, str]] = {
    "max_epochs": (1, "-1 for no limit"),
    "max_steps": (1, "-1 for no limit"),
    "min_epochs": (0, ""),
    "min_steps": (0, ""),
    "check_val_every_n_epoch": (1, ""),
    "log_every_n_steps": (0, ""),
    "accumulate_grad_batches": (1, ""),
    "gradient_clip_val": (0, ""),
}
_ABOVE_ZERO = ("limit_train_batches", "val_check_interval")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Check that numbers among the Trainer's arguments are in range.

    Args:
        options: the Trainer's arguments by name. Missing ones, and None where None has a meaning,
            are not checked.

    Raises:
        TrainingError: when a number is out of range.
    """
    for name, (least, other) in _LEAST.items():
        value = options.get(name)
        unlimited = other and value == -1
        if isinstance(value, int | float) and not unlimited and not value >= least:
            or_other = f", or {other}" if other else ""
            raise TrainingError(f"--trainer.{name} must be {least} or more{or_other}, not {value}.")
    if options.get("accumulate_grad_batches", 1) is None:
        raise TrainingError("--trainer.accumulate_grad_batches must be 1 or more, not null.")
    for name in _ABOVE_ZERO:
        value = options.get(name)
        if isinstance(value, int | float) and value == 0:
            raise TrainingError(f"--trainer.{name} must be above 0, not {value}.")
    devices = str(options.get("devices", "auto")).strip()
    if devices.lstrip("+-").isdigit():
        count = int(devices)
        if not (1 <= count <= _MOST_PROCESSES or count == -1):
            raise TrainingError(
                f"--trainer.devices must be from 1 to {_MOST_PROCESSES}, or -1 or auto for all "
                f"devices, not {count}."
            )
