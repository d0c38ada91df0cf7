"""Order the guesses for the variables of a container, the likeliest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpd_cli.widening.names import split_name
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES
from gpd_cli.widening.observe.recording import Reads
from gpd_cli.widening.search.variables import (
    DIVIDED,
    SIDE_BY_SIDE,
    STAYS_NARROW,
    LayoutVariable,
    NumberVariable,
    Variable,
)

Guess = tuple[str, ...]
"""One label (of an option) for each variable of a container, in the order of the variables."""

_MOST_CHANGES = 3  # the most labels in which a guess differs from one of the likeliest guesses


def counts_in(variables: Sequence[Variable[Any]], reads: Reads | None) -> list[int | None]:
    """Collect the numbers of heads (or groups) that guesses may assume to widen, likeliest first.

    Values of attributes with the usual names come first, then None for no assumption, then all
    factors of splits.

    Args:
        variables: the variables of a container.
        reads: what the container's own code reads.
    """
    found: dict[int | None, None] = {}
    if reads is not None:
        for name, value in reads.numbers.items():
            if split_name(name)[1] in HEAD_COUNT_NAMES and isinstance(value, int):
                found[value] = None
    found[None] = None
    for variable in variables:
        if isinstance(variable, LayoutVariable):
            for sizes in variable.counts.values():
                found.update(dict.fromkeys(sorted(sizes)))
    return list(found)


def ordered_guesses(
    variables: Sequence[Variable[Any]],
    counts: Sequence[int | None],
    remembered: Sequence[Mapping[str, str]] = (),
) -> Iterator[Guess]:
    """Generate all guesses that are worth a trial, the likeliest first.

    First come guesses that were right for other modules of the class, then guesses in which all
    outputs of layers widen, and last those that keep some outputs narrow.

    Args:
        variables: the variables of a container.
        counts: numbers of heads (or groups) to assume, the likeliest first, from `counts_in`.
        remembered: guesses that were right for other modules of the class, as labels by the names
            of the variables.
    """
    old: list[Guess] = []
    for labels in remembered:
        known = [labels.get(v.names[0], "") for v in variables]
        pairs = zip(known, variables, strict=True)
        old.append(tuple(label if label in v.options else v.first for label, v in pairs))
    bases = [_base(variables, count, inner) for count in counts for inner in (True, False)]
    # The next likeliest guess is wider heads instead of more heads. Attention's scale then may have
    # to be divided, since products of queries and keys are sums over the copies.
    bases[1:1] = [_all_side_by_side(variables, factor) for factor in (STAYS_NARROW, DIVIDED)]
    bases.append(
        tuple(v.first if isinstance(v, LayoutVariable) else STAYS_NARROW for v in variables)
    )
    bases = [
        base for base in bases if all(g in v.options for g, v in zip(base, variables, strict=True))
    ]
    full = [base for base in bases if _is_full(variables, base)]
    seen: set[Guess] = set()
    for candidate in itertools.chain(
        old,
        (c for c in _around(variables, full, _MOST_CHANGES - 1) if _is_full(variables, c)),
        _around(variables, [*bases, *old], _MOST_CHANGES),
    ):
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def _base(variables: Sequence[Variable[Any]], count: int | None, inner: bool) -> Guess:
    """Make the likeliest guess, if it is assumed which number of heads widens.

    Args:
        variables: the variables of a container.
        count: the number of heads (or groups) that is assumed to widen; None for no assumption.
        inner: whether the innermost of several axes of this size is assumed to widen.
    """
    named = any(v.is_count and count in set().union(*v.counts.values()) for v in variables)
    return tuple(
        # If an attribute with a usual name holds the number of heads, attributes with other names
        # that happen to have the same value are no counts.
        v.first
        if named and isinstance(v, NumberVariable) and not v.is_count
        else v.preferred(count, inner)
        for v in variables
    )


def _all_side_by_side(variables: Sequence[Variable[Any]], factor: str) -> Guess:
    """Make the guess that all layers have their copies side by side.

    Args:
        variables: the variables of a container.
        factor: the label for factors of products, `STAYS_NARROW` or `DIVIDED`.
    """
    return tuple(
        SIDE_BY_SIDE if SIDE_BY_SIDE in v.options else factor if DIVIDED in v.options else v.first
        for v in variables
    )


def _around(
    variables: Sequence[Variable[Any]], bases: Sequence[Guess], most: int
) -> Iterator[Guess]:
    """Generate guesses that differ from a base in at most ``most`` labels, few changes first."""
    for changes in range(most + 1):
        for base in bases:
            for which in itertools.combinations(range(len(variables)), changes):
                others = [
                    [label for label in variables[k].options if label != base[k]] for k in which
                ]
                for changed in itertools.product(*others):
                    candidate = list(base)
                    for k, label in zip(which, changed, strict=True):
                        candidate[k] = label
                    yield tuple(candidate)


def _is_full(variables: Sequence[Variable[Any]], guess: Guess) -> bool:
    """Whether all outputs of layers widen, apart from segments of a single output."""
    return all(
        segment.grows or segment.size == 1
        for variable, label in zip(variables, guess, strict=True)
        if isinstance(variable, LayoutVariable)
        for segment in variable.options[label]
    )
