"""Detection of training steps whose loss or gradients are NaN or infinite.

Such steps are left out, and the batch and images behind them are named in a message. Too many of
them in a row stop the run or reduce the learning rate, see `broken_numbers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.distill.distillation import Distillation
from gpd_cli.distributed.world import everywhere, gathered
from gpd_cli.teacher.buffers import Buffers

_SHOWN = 3  # most images that a message names

NameImages = Callable[[int, Sequence[int]], list[str]]


@dataclass(frozen=True)
class BatchCheck:
    """Which values of a batch's forward pass are finite, in one process.

    All tensors are of booleans, which stay on the training device until someone asks for them.

    Args:
        finite_terms: for each term of the loss, by name, whether it is finite; scalars.
        finite_pixels: for each image of the batch, whether its pixels are finite; ``[B]``.
        finite_logits: for each image, whether its logits of all networks are finite; ``[B]``.
        epoch: number of the epoch, counted from 0.
        batch: number of the batch in its epoch, counted from 0.
    """

    finite_terms: Mapping[str, Tensor]
    finite_pixels: Tensor
    finite_logits: Tensor
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
    ) -> BatchCheck:
        """Check loss terms (scalars), images ``[B, C, H, W]`` and logits ``[B, C]`` per network."""
        return cls(
            {name: torch.isfinite(term) for name, term in terms.items()},
            # A sum takes one pass and no further memory, and is finite if all pixels are finite.
            torch.isfinite(images.detach().flatten(1).sum(1, dtype=torch.float32)),
            torch.stack([torch.isfinite(found).all(1) for found in logits]).all(0),
            epoch,
            batch,
        )

    def broken_terms(self) -> list[str]:
        """Names of the terms that are NaN or infinite."""
        return [name for name, finite in self.finite_terms.items() if not finite.all()]

    def images_with_broken_pixels(self) -> list[int]:
        """Positions in the batch, counted from 0, of images with NaN or infinite pixels."""
        return _places(self.finite_pixels)

    def images_with_broken_logits(self) -> list[int]:
        """Positions in the batch, counted from 0, of images with NaN or infinite logits."""
        return _places(self.finite_logits)


class StepLeftOut(Exception):  # noqa: N818 - nothing is wrong with the program
    """Raised from within an optimizer step, before the update, so that the update is not made.

    Removing the gradients is not enough: without gradients an optimizer changes neither weights nor
    momentum, but some optimizers count the step all the same (Lookahead, timm's Lamb and Adan), and
    some versions of Lamb fail.
    """


class StepWatch:
    """Finds steps that would break the weights, and undoes their effect on buffers.

    The optimizer does not make such a step, see `StepLeftOut`. Running statistics and other buffers
    that the forward pass has changed are restored, as if the batch had never come.

    Args:
        network: the networks that are trained.
        most: largest number of steps in a row that are left out; one more stops the run.
        distillation: the distillation from static teachers, whose buffers are restored as well.

    Attributes:
        in_a_row: number of steps left out since the last step that was made.
        all_logits_broken: whether, in the last step that was left out, every image had NaN or
            infinite logits although no image had NaN or infinite pixels.
    """

    def __init__(
        self, network: nn.Module, most: int, distillation: Distillation | None = None
    ) -> None:
        self.network, self.most = network, most
        self.in_a_row = 0
        self.all_logits_broken = False
        self._checks: list[BatchCheck] = []
        self._distillation = distillation
        self._buffers: list[Buffers] = []
        self._is_first = True
        self._pixels_were_finite = True

    def begin_epoch(self) -> None:
        """Forget the buffers: the next step lists them anew, and finds out which of them change."""
        self._buffers = []

    def begin(self, check: BatchCheck) -> None:
        """Record a batch that contributes to the next optimizer step.

        Args:
            check: which values of the batch's forward pass are finite.
        """
        self._checks.append(check)
        if self._is_first:
            self._is_first = False
            for buffers in self._buffers:
                buffers.find_uncounted()

    def remember(self) -> None:
        """Save the buffers before the forward pass of the first batch of a step."""
        if self._checks:
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
        """Decide whether a step has to be left out, before the optimizer makes the step.

        All processes have the same gradients, and so come to the same decision.

        Args:
            gradients: gradients of all weights.
            name_images: function from the number of a batch in its epoch and positions in the batch
                to the names of the images at these positions.

        Returns:
            A text that says what is wrong, if the step has to be left out; otherwise None.
        """
        checks, self._checks = self._checks, []
        finite = torch.tensor(True)
        if gradients:
            norms = torch._foreach_norm(list(gradients))
            finite = torch.isfinite(torch.stack(list(norms))).all()
        if bool(finite):
            self.in_a_row, self.all_logits_broken = 0, False
            return None
        self.in_a_row += 1
        processes = gathered([_found(check, name_images) for check in checks])
        found = [one for process in processes for one in process]
        self._pixels_were_finite = not any(one["pixels"] for one in found)
        self.all_logits_broken = self._pixels_were_finite and all(one["all"] for one in found)
        return _in_words(found)

    def undo(self) -> None:
        """Restore the buffers to their values before the step."""
        for buffers in self._buffers:
            buffers.put_back()

    def undo_broken_batches(self) -> None:
        """Restore the buffers if the next step will be left out because of its batches so far.

        This is for what comes between the batches of a step: a validation or a checkpoint.
        """
        if not self._checks:
            return
        finite = torch.stack(
            [term for check in self._checks for term in check.finite_terms.values()]
        )
        if not everywhere(finite.all()):
            self.undo()

    @property
    def is_suspicious(self) -> bool:
        """Whether the last step was left out although the pixels of its images were finite."""
        return self.in_a_row > 0 and self._pixels_were_finite


def are_finite(network: nn.Module) -> bool:
    """Whether all weights are finite, in every process; asked before they are scored or saved."""
    return everywhere(_finite([parameter.detach() for parameter in network.parameters()]))


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element of every tensor is finite, as a boolean scalar tensor."""
    # If a tensor's sum is finite, so are its elements. Sums take a tenth of the time of a check of
    # each element, which is needed only when finite elements have overflowed in a sum.
    sums = torch.isfinite(torch.stack([tensor.sum() for tensor in tensors])).all()
    if sums:
        return sums
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()


def overflowing(network: nn.Module, most: float) -> list[str]:
    """Names of modules whose weights, merged if there are branches, overflow a number type.

    Args:
        network: the networks that are trained.
        most: the largest number that the type can represent.
    """
    found = []
    with torch.no_grad():
        for name, module in network.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.numel() and not weight.abs().max() <= most:
                found.append(name)
    return found


def _found(check: BatchCheck, name_images: NameImages) -> dict[str, Any]:
    """What is wrong with a batch, as plain values that can be sent to the other processes."""
    pixels, rows = check.images_with_broken_pixels(), check.images_with_broken_logits()
    where = pixels or rows
    return {
        "terms": check.broken_terms(),
        "pixels": bool(pixels),
        "images": name_images(check.batch, where[:_SHOWN]),
        "more": len(where) - _SHOWN,
        "all": len(where) == len(check.finite_pixels),
        "batch": f"batch {check.batch + 1} of epoch {check.epoch + 1}",
    }


def _in_words(found: Sequence[Mapping[str, Any]]) -> str:
    """Describe the batch that says most: with broken pixels, or else with a broken loss, if any.

    Args:
        found: the outputs of `_found` for all batches of a step, in all processes.
    """
    one = max(found, key=lambda one: (one["pixels"], bool(one["terms"])))
    what = f"the loss ({', '.join(one['terms'])})" if one["terms"] else "a gradient"
    text = f"{what} is NaN or infinite in {one['batch']}"
    if not one["images"]:
        return text
    images = ", ".join(one["images"]) + (f" and {one['more']} more" if one["more"] > 0 else "")
    if one["pixels"]:
        return f"{text}, as are pixels of {images}"
    return text if one["all"] else f"{text}, for {images}"


def _places(finite: Tensor) -> list[int]:
    found: list[int] = torch.nonzero(~finite).flatten().tolist()
    return found
