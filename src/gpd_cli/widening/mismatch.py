"""Whether wide activations are replications of the student's, and the outcome when not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gpd_cli.widening.match import match_axes
from gpd_cli.widening.plan import IndexMap

_REMEMBERED = 16  # tensors


class Mismatch(Exception):  # noqa: N818 - an outcome of a trial, not an error
    """A module does not follow the copies in its input, as far as its container has widened.

    Args:
        name: the module.
        reason: the cause, as a clause for a message.
        arithmetic: whether no numbers in the module's code would help, so that trials are useless.
    """

    def __init__(self, name: str, reason: str, *, arithmetic: bool = False) -> None:
        super().__init__(name, reason)
        self.name, self.reason, self.arithmetic = name, reason, arithmetic


class Matches:
    """Index maps of activations; recent ones are kept, since modules hand tensors on unchanged."""

    def __init__(self) -> None:
        self._last: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()

    def axes(self, narrow: Tensor, wide: Tensor) -> tuple[IndexMap | None, ...] | None:
        """The result of `match_axes`, from the cache where the same tensors were matched before."""
        key = (id(narrow), id(wide), wide._version)
        if key not in self._last:
            # The tensors are kept as well, so that their ids are not used again.
            self._last[key] = (match_axes(narrow, wide), narrow, wide)
            if len(self._last) > _REMEMBERED:
                self._last.popitem(last=False)
        found: tuple[IndexMap | None, ...] | None = self._last[key][0]
        return found

    def input(self, name: str, recorded: Tensor, x: Tensor) -> tuple[IndexMap | None, ...]:
        """The index map of each axis of a module's input.

        Args:
            name: the module.
            recorded: the student's input.
            x: the same input in the wide network.

        Raises:
            Mismatch: when the wide input is no replication of the student's.
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
        """Check that each output of a module is a replication; the logits may not widen.

        Args:
            name: the module; empty for the network itself.
            recorded: the student's outputs.
            outputs: the same outputs of the wide network.

        Raises:
            Mismatch: when an output is no replication.
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
