"""Whether a wide activation follows the copies that a guess says there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from gpd_cli.expansion.plan import IndexMap
from gpd_cli.expansion.probing.match import match_axes


class Mismatch(Exception):  # noqa: N818 - an outcome of a trial, not an error
    """A guess did not work out.

    Args:
        name: the module where that showed.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


def match_input(name: str, recorded: Tensor, x: Tensor) -> tuple[IndexMap | None, ...]:
    """How an input of a module widened, axis by axis.

    Raises:
        Mismatch: when it is no replication of the recorded one.
    """
    axes = match_axes(recorded, x)
    if axes is None:
        raise Mismatch(
            name,
            "its input is not a replication of the student's input, because something before it "
            "mixes channels by position",
        )
    return axes


def check_output(name: str, recorded: Sequence[Tensor], outputs: Iterable[Tensor]) -> None:
    """Check that each output of a module is a replication; the network's own may not widen.

    Args:
        name: the module; empty for the network itself.
        recorded: the student's outputs.
        outputs: the teacher's.

    Raises:
        Mismatch: when one is not.
    """
    tensors = list(outputs)
    exact = len(tensors) == len(recorded)
    for narrow, wide in zip(recorded, tensors, strict=False):
        exact = exact and match_axes(narrow, wide) is not None
        exact = exact and (bool(name) or narrow.shape == wide.shape)
    if not exact:
        raise Mismatch(
            name,
            "its output does not follow the copies in its input: it mixes or cuts channels by "
            "their position, or counts them",
        )
