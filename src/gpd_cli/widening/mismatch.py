"""The exception for modules of the wide network that do not compute copies of the student's."""

from __future__ import annotations

from torch import Tensor

ANOTHER_PATH = "its code takes another path when its layers are wider"
"""The reason when the code of a wide module does not make the same calls as in the student."""


class Mismatch(Exception):  # noqa: N818 - an outcome of a trial, not an error
    """In this module, the wide network does not compute copies of what the student computes.

    This is the outcome of the present guess of layouts and attributes; other guesses may help.

    Args:
        name: name of the module.
        reason: the cause, as a clause of an error message.
        needs_other_layout: whether no values of attributes help, so that only other layouts of
            layers' outputs may. The search then guesses no attributes, and tries a few layouts.
        tensors: where the mismatch is between two tensors, the student's tensor and the wide one,
            which is no replication of it.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        *,
        needs_other_layout: bool = False,
        tensors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(name, reason)
        self.name, self.reason, self.needs_other_layout = name, reason, needs_other_layout
        self.tensors = tensors


class UnfitMultiple(Mismatch):
    """A module's input or output is a multiple of copies, but has to be plain copies."""


def times(factor: float) -> str:
    """Describe a multiple of copies and its cause, as the end of a clause of an error message.

    Args:
        factor: the number that the copies are multiplied by.
    """
    return f"times {factor:.3g}, because of a norm of copies or a sum over them"
