"""The outcome where a module of the wide network does not follow the copies in its input."""

from __future__ import annotations

from torch import Tensor

ANOTHER_PATH = "its code takes another path when its layers are wider"
"""The reason where wide code does not make the calls that the student's code makes."""


class Mismatch(Exception):  # noqa: N818 - an outcome of a trial, not an error
    """The wide network does not compute copies of what the student computes in this module.

    That is so with the layouts and attributes of the present guess; other guesses may help.

    Args:
        name: the module.
        reason: the cause, as a clause for a message.
        needs_other_layout: whether no value of any attribute helps. Only other layouts of layers'
            outputs may: the search then guesses no attributes, and tries a few layouts.
        tensors: the student's tensor and the wide one that is no multiple of a replication of it,
            where the mismatch is between two tensors.
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
    """A module's input or output is a multiple of a replication, where it has to be one itself."""


def times(multiple: float) -> str:
    """A multiple of copies with its cause, as the end of a clause.

    Args:
        multiple: the multiple; 1 would be a replication.
    """
    return f"times {multiple:.3g}, because of a norm of copies or a sum over them"
