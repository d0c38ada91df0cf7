"""Whether wide activations are replications of the student's, and the outcome when not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gpd_cli.widening.match import match_multiple
from gpd_cli.widening.plan import IndexMap

ANOTHER_PATH = "its code takes another path when its layers are wider"
"""The reason where wide code does not make the calls that the student's code makes."""

_REMEMBERED = 16  # tensors


class Mismatch(Exception):  # noqa: N818 - an outcome of a trial, not an error
    """A module does not follow the copies in its input, as far as its container has widened.

    Args:
        name: the module.
        reason: the cause, as a clause for a message.
        arithmetic: whether no numbers in the module's code would help, so that trials are useless.
        tensors: the student's tensor and the wide one that is no multiple of a replication of it,
            where the mismatch is between two tensors.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        *,
        arithmetic: bool = False,
        tensors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(name, reason)
        self.name, self.reason, self.arithmetic = name, reason, arithmetic
        self.tensors = tensors


class UnfitMultiple(Mismatch):
    """A module's input or output is a multiple of a replication, where it has to be one itself."""


Match = tuple[tuple[IndexMap | None, ...], float]
"""Index maps by axis, and the multiple of a replication that an activation is."""


class Matches:
    """Index maps of activations; recent ones are kept, since modules hand tensors on unchanged.

    Args:
        multiples: whether multiples of replications match as well.
    """

    def __init__(self, multiples: bool = False) -> None:
        self._multiples = multiples
        self._last: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()

    def find(self, narrow: Tensor, wide: Tensor) -> Match | None:
        """The result of `match_multiple`; None for a multiple where these do not match."""
        found = self._find(narrow, wide)
        return found if found is None or found[1] == 1 or self._multiples else None

    def withholds(self, narrow: Tensor, wide: Tensor) -> bool:
        """Whether two tensors would match if multiples of replications did."""
        return self.find(narrow, wide) is None and self._find(narrow, wide) is not None

    def _find(self, narrow: Tensor, wide: Tensor) -> Match | None:
        """The result of `match_multiple`, also where the same tensors were matched before."""
        key = (id(narrow), id(wide), wide._version)
        if key not in self._last:
            # The tensors are kept as well, so that their ids are not used again.
            self._last[key] = (match_multiple(narrow, wide), narrow, wide)
            if len(self._last) > _REMEMBERED:
                self._last.popitem(last=False)
        found: Match | None = self._last[key][0]
        return found

    def axes(self, name: str, recorded: Tensor, x: Tensor) -> tuple[IndexMap | None, ...]:
        """The index map of each axis of a module's input; arguments as for `input`."""
        return self.input(name, recorded, x)[0]

    def input(self, name: str, recorded: Tensor, x: Tensor) -> Match:
        """The index map of each axis of a module's input, and the multiple of copies that it is.

        Args:
            name: the module.
            recorded: the student's input.
            x: the same input in the wide network.

        Raises:
            Mismatch: when the wide input is no multiple of a replication of the student's.
        """
        found = self.find(recorded, x)
        if found is None:
            raise Mismatch(
                name,
                "its input is not a replication of the student's input, because something before "
                "it mixes channels by position",
                tensors=(recorded, x),
            )
        return found

    def check_output(
        self,
        name: str,
        recorded: Sequence[Tensor],
        outputs: Iterable[Tensor],
        allows_multiples: bool = False,
    ) -> None:
        """Check that each output of a module is a replication; the logits may not widen.

        Args:
            name: the module; empty for the network itself.
            recorded: the student's outputs.
            outputs: the same outputs of the wide network.
            allows_multiples: whether outputs may be multiples of replications as well.

        Raises:
            Mismatch: when an output is no replication.
        """
        tensors = list(outputs)
        pairs = list(zip(recorded, tensors, strict=False))
        found = [self.find(*pair) for pair in pairs]
        exact = len(tensors) == len(recorded) and None not in found
        exact = exact and (bool(name) or all(n.shape == w.shape for n, w in pairs))
        if not exact:
            raise Mismatch(
                name,
                "its output does not follow the copies in its input: it mixes or cuts channels by "
                "their position, or counts them",
                tensors=next((p for p, f in zip(pairs, found, strict=True) if f is None), None),
            )
        multiples = [match[1] for match in found if match is not None and match[1] != 1]
        if multiples and not allows_multiples:
            reason = f"its output is the student's output {times(multiples[0])}"
            raise UnfitMultiple(name, reason)


def times(multiple: float) -> str:
    """A multiple of copies with its cause, as the end of a clause.

    Args:
        multiple: the multiple; 1 would be a replication.
    """
    return f"times {multiple:.3g}, because of a norm of copies or a sum over them"
