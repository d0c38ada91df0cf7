"""Whether a wide activation follows the copies that a guess says there are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gpd_cli.widening.match import match_axes
from gpd_cli.widening.plan import IndexMap

_REMEMBERED = 16  # tensors


class Mismatch(Exception):  # noqa: N818 - an outcome of a trial, not an error
    """A guess did not work out.

    Args:
        name: the module where that showed.
        reason: what is wrong with it.
        arithmetic: whether no numbers in the module's code would do, so that trying some is idle.
    """

    def __init__(self, name: str, reason: str, *, arithmetic: bool = False) -> None:
        super().__init__(name, reason)
        self.name, self.reason, self.arithmetic = name, reason, arithmetic


class Matches:
    """How tensors widened; the last ones are remembered, since modules hand them on unchanged."""

    def __init__(self) -> None:
        self._last: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()

    def axes(self, narrow: Tensor, wide: Tensor) -> tuple[IndexMap | None, ...] | None:
        """As `match_axes`."""
        key = (id(narrow), id(wide), wide._version)
        if key not in self._last:
            # The tensors are kept as well, so that no other ones get their identities.
            self._last[key] = (match_axes(narrow, wide), narrow, wide)
            if len(self._last) > _REMEMBERED:
                self._last.popitem(last=False)
        found: tuple[IndexMap | None, ...] | None = self._last[key][0]
        return found

    def input(self, name: str, recorded: Tensor, x: Tensor) -> tuple[IndexMap | None, ...]:
        """How an input of a module widened, axis by axis.

        Raises:
            Mismatch: when it is no replication of the recorded one.
        """
        axes = self.axes(recorded, x)
        if axes is None:
            raise Mismatch(
                name,
                "its input is not a replication of the student's input, because something before "
                "it mixes channels by position",
            )
        return axes

    def check_output(
        self, name: str, recorded: Sequence[Tensor], outputs: Iterable[Tensor]
    ) -> None:
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
            exact = exact and self.axes(narrow, wide) is not None
            exact = exact and (bool(name) or narrow.shape == wide.shape)
        if not exact:
            raise Mismatch(
                name,
                "its output does not follow the copies in its input: it mixes or cuts channels by "
                "their position, or counts them",
            )
