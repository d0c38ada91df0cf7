"""Judgement of how a command has handled a damaged file or option."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.fuzz.cases import OUTPUT, SIGN, Case
from bench.fuzz.isolate import Outcome
from gpd_cli.cli.failures import DIVERGED

_LONGEST = 700  # most characters in an error message


def judge(case: Case, outcome: Outcome, folder: Path, expected: Path | None) -> tuple[str, str]:
    """Judge how a command ended.

    Args:
        case: the case.
        outcome: how the command of the case ended.
        folder: folder in which the command ran.
        expected: path of the output without damage; None if outputs cannot be compared.

    Returns:
        The verdict (``refused``, ``taken``, or a word for what is wrong), and a text that shows it.
    """
    errors = outcome.errors
    said = [line for line in errors.splitlines() if line.startswith("gpd: error:")]
    left = [path.name for path in folder.rglob(".tmp-*")]
    outputs = [folder / OUTPUT, folder / "out.safetensors", folder / "out.csv"]
    if (folder / SIGN).exists():
        return "ran code", case.damage
    if outcome.stopped:
        return "hangs", errors[-300:]
    if outcome.code < 0:
        return "dies", f"signal {-outcome.code}: {errors[-300:]}"
    if left:
        return "leaves", ", ".join(left)
    if "Traceback" in errors:
        return "traceback", errors[-600:]
    if outcome.code == 0:
        return _judge_taken(case, outputs, expected)
    if outcome.code not in (1, 2, DIVERGED) or len(said) != 1:
        return "no sentence", f"code {outcome.code}: {errors[-400:]}"
    if "not foreseen" in said[0] or len(said[0]) > _LONGEST:
        return "not foreseen", said[0][:_LONGEST]
    if any(output.exists() for output in outputs):
        return "leaves", "an output, though it failed"
    return "refused", said[0]


def _judge_taken(case: Case, outputs: list[Path], expected: Path | None) -> tuple[str, str]:
    written = next((output for output in outputs if output.exists()), None)
    if written is None or written.suffix == ".csv":
        return "taken", ""
    tensors = _tensors(written)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        return "not finite", "what was written"
    if case.same and expected is not None:
        others = _tensors(expected)
        # Not all files have counters of batches, and no output of a network depends on them.
        tensors, others = (
            {name: t for name, t in found.items() if not name.endswith("num_batches_tracked")}
            for found in (tensors, others)
        )
        same = tensors.keys() == others.keys() and all(
            torch.equal(tensor, others[name]) for name, tensor in tensors.items()
        )
        if not same:
            return "another output", "than without damage"
    return "taken", ""


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    content: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return content
