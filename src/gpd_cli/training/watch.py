"""Steps whose loss or gradients are NaN or infinite: left out, named, a reason to stop at last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.distill.distillation import Distillation
from gpd_cli.distributed.world import everywhere, gathered
from gpd_cli.errors import TrainingError
from gpd_cli.teacher.buffers import Buffers

_SHOWN = 3  # images in a message

NameImages = Callable[[int, Sequence[int]], list[str]]


@dataclass(frozen=True)
class Seen:
    """Whether what a step has computed is finite, in one process; kept on the device.

    Args:
        terms: per term of the loss, by name: scalars.
        pixels: per image of the batch, ``[B]``.
        logits: per image, of all networks, ``[B]``.
        epoch: counted from 0.
        batch: number of the batch in its epoch, counted from 0.
    """

    terms: Mapping[str, Tensor]
    pixels: Tensor
    logits: Tensor
    epoch: int
    batch: int

    @classmethod
    def of(
        cls,
        terms: Mapping[str, Tensor],
        images: Tensor,
        logits: Sequence[Tensor],
        epoch: int,
        batch: int,
    ) -> Seen:
        """Look at terms, images ``[B, C, H, W]`` and logits ``[B, C]``."""
        return cls(
            {name: torch.isfinite(term) for name, term in terms.items()},
            # Sums take one pass and no memory; they are finite where all pixels are.
            torch.isfinite(images.detach().flatten(1).sum(1, dtype=torch.float32)),
            torch.stack([torch.isfinite(found).all(1) for found in logits]).all(0),
            epoch,
            batch,
        )

    def broken_terms(self) -> list[str]:
        """Names of the terms that are NaN or infinite."""
        return [name for name, finite in self.terms.items() if not finite.all()]

    def broken_images(self) -> list[int]:
        """Places in the batch of images that have such pixels."""
        return _places(self.pixels)

    def broken_rows(self) -> list[int]:
        """Places in the batch of images that give such logits."""
        return _places(self.logits)


class StepLeftOut(Exception):  # noqa: N818 - nothing is wrong with the program
    """Passes the optimizer by, from within its step.

    Without gradients an optimizer changes neither weights nor momentum, but some count the step all
    the same (Lookahead, timm's Lamb and Adan), and some versions of Lamb fail.
    """


class StepWatch:
    """Leaves out steps that would break the weights, as if their batches had not come.

    The optimizer does not make such a step, see `StepLeftOut`. Running statistics and other buffers
    that the forward pass has changed get their values of before.

    Args:
        network: the networks that are trained.
        most: number of steps in a row that are left out; another one stops the run.
        distillation: methods of distillation, whose buffers are given back as well.

    Attributes:
        in_a_row: number of steps that were left out since the last one that was made.
        all_rows: whether the last of them had such logits for every image, of which none had such
            pixels.
    """

    def __init__(
        self, network: nn.Module, most: int, distillation: Distillation | None = None
    ) -> None:
        self.network, self.most = network, most
        self.in_a_row = 0
        self.all_rows = False
        self.seen: list[Seen] = []
        self._distillation = distillation
        self._buffers: list[Buffers] = []
        self._is_first = True
        self._blamed = True

    def begin_epoch(self) -> None:
        """Look anew which buffers there are, and which of them steps change."""
        self._buffers = []

    def begin(self, seen: Seen) -> None:
        """Note a batch of the step to come.

        Args:
            seen: what its forward pass has computed.
        """
        self.seen.append(seen)
        if self._is_first:
            self._is_first = False
            for buffers in self._buffers:
                buffers.find_uncounted()

    def remember(self) -> None:
        """Keep the buffers, before the forward pass of a batch that begins a step."""
        if self.seen:
            return
        if not self._buffers:
            self._is_first = True
            self._buffers.append(Buffers(self.network))
            if self._distillation is not None:
                without = self._distillation.stays_finite()
                self._buffers.append(Buffers(self._distillation, without))
        for buffers in self._buffers:
            buffers.keep()

    def judge(self, gradients: Sequence[Tensor], name_images: NameImages) -> str | None:
        """Look at a step, before the optimizer makes it.

        Gradients are common to all processes, and so is the answer.

        Args:
            gradients: gradients of all weights.
            name_images: gives names to images of a batch, by the number of the batch in its epoch
                and their places in it.

        Returns:
            What is wrong, in words, of a step that has to be left out.
        """
        seen, self.seen = self.seen, []
        finite = torch.tensor(True)
        if gradients:
            norms = torch._foreach_norm(list(gradients))
            finite = torch.isfinite(torch.stack(list(norms))).all()
        if bool(finite):
            self.in_a_row, self.all_rows = 0, False
            return None
        self.in_a_row += 1
        processes = gathered([_found(one, name_images) for one in seen])
        found = [one for process in processes for one in process]
        self._blamed = not any(one["pixels"] for one in found)
        self.all_rows = self._blamed and all(one["all"] for one in found)
        return _in_words(found)

    def undo(self) -> None:
        """Give the buffers the values of before the step."""
        for buffers in self._buffers:
            buffers.put_back()

    @property
    def is_suspicious(self) -> bool:
        """Whether the last step was left out, and its images had no part in it."""
        return self.in_a_row > 0 and self._blamed


def check_weights(network: nn.Module, step: int) -> None:
    """Check the weights themselves, before they are scored or saved.

    Raises:
        TrainingError: when a weight is NaN or infinite.
    """
    if not everywhere(_finite([parameter.detach() for parameter in network.parameters()])):
        raise TrainingError(f"The weights became NaN or infinite by step {step}; {remedy()}")


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every number of every tensor is finite, as a tensor of one truth value."""
    # A finite sum has finite numbers only, and takes a tenth of the time of looking at each number.
    sums = torch.isfinite(torch.stack([tensor.sum() for tensor in tensors])).all()
    if sums:
        return sums
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()


def remedy(go_on: str = "") -> str:
    """What to do against numbers that break.

    Args:
        go_on: how the run goes on from its last good checkpoint, if there is one.
    """
    text = (
        "lower --model.optimizer.lr, clip gradients with --trainer.gradient_clip_val 5, train in "
        "32-bit precision, or set --model.on_nan reduce_lr"
    )
    return f"{text} (checkpoints of earlier epochs are kept{go_on})."


def overflowing(network: nn.Module, most: float) -> list[str]:
    """Names of merged kernels with larger numbers than a type can hold.

    Args:
        network: the networks that are trained.
        most: the largest number of the type.
    """
    found = []
    with torch.no_grad():
        for name, module in network.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.numel() and not weight.abs().max() <= most:
                found.append(name)
    return found


def _found(seen: Seen, name_images: NameImages) -> dict[str, Any]:
    """What is wrong with a batch, in plain values for the other processes."""
    pixels, rows = seen.broken_images(), seen.broken_rows()
    where = pixels or rows
    return {
        "terms": seen.broken_terms(),
        "pixels": bool(pixels),
        "images": name_images(seen.batch, where[:_SHOWN]),
        "more": len(where) - _SHOWN,
        "all": len(where) == len(seen.pixels),
        "batch": f"batch {seen.batch + 1} of epoch {seen.epoch + 1}",
    }


def _in_words(found: Sequence[Mapping[str, Any]]) -> str:
    """The first broken batch, or what there is to say where only gradients are broken."""
    one = next((one for one in found if one["terms"]), found[0])
    what = f"the loss ({', '.join(one['terms'])})" if one["terms"] else "a gradient"
    text = f"{what} is NaN or infinite in {one['batch']}"
    if not one["images"]:
        return text
    images = ", ".join(one["images"]) + (f" and {one['more']} more" if one["more"] > 0 else "")
    if one["pixels"]:
        return f"{text}, where pixels of {images} are"
    return text if one["all"] else f"{text}, for {images}"


def _places(finite: Tensor) -> list[int]:
    found: list[int] = torch.nonzero(~finite).flatten().tolist()
    return found
