"""Solve for the attributes that have to change, so that code computes the wanted numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gpd_cli.widening.numbers.arithmetic import (
    Attribute,
    Expression,
    attributes_in,
    evaluate,
    invert,
    text,
)
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES

_MOST_STEPS = 500  # most steps of the search; one container has only a few equations


class Unsolvable(Exception):  # noqa: N818 - an outcome, not an error
    """No values of the attributes satisfy the equations; the message names a number in the way."""


@dataclass(frozen=True)
class Equation:
    """A number in the code of a container, and the value that it has to have in the wide network.

    Args:
        expression: how the code computed the number.
        wanted: the number's value in the wide network.
        given: the number's value in the student.
    """

    expression: Expression
    wanted: int
    given: int


def solve(
    equations: Sequence[Equation],
    values: Mapping[Attribute, int],
    fixed: Collection[Attribute] = (),
) -> dict[Attribute, int]:
    """Find values of attributes under which every equation holds.

    Args:
        equations: the equations of one container.
        values: the present values of all attributes in the equations.
        fixed: attributes that cannot change, such as layers' attributes, which follow from the
            layers' tensors.

    Returns:
        The new values of the attributes that change, the first solution of the search.

    Raises:
        Unsolvable: when no solution is found; the message names the number in the way, or says that
            the search was given up.

    Example:
        >>> from gpd_cli.widening.numbers.arithmetic import Operation
        >>> heads, width = Attribute("attn", "num_heads"), Attribute("attn", "head_dim")
        >>> wide_heads = Equation(heads, wanted=12, given=6)
        >>> wide_channels = Equation(Operation("*", heads, width), wanted=384, given=192)
        >>> solve([wide_heads, wide_channels], {heads: 6, width: 32})
        {Attribute(owner='attn', name='num_heads', entry=None): 12}
    """
    steps = 0

    def search(changed: dict[Attribute, int]) -> dict[Attribute, int] | None:
        nonlocal steps
        steps += 1
        now = {**values, **changed}
        broken = [e for e in equations if evaluate(e.expression, now) != e.wanted]
        if not broken:
            return changed
        if steps > _MOST_STEPS:
            return None
        # The equation with the fewest unknowns comes first, since it leaves the fewest choices.
        equation = min(broken, key=lambda e: len(_unknowns(e, changed, fixed)))
        for attribute in _unknowns(equation, changed, fixed):
            value = invert(equation.expression, equation.wanted, attribute, now)
            if value is not None and value >= 0:
                found = search({**changed, attribute: value})
                if found is not None:
                    return found
        return None

    solution = search({})
    if solution is None:
        raise Unsolvable(_reason(equations, values, fixed, steps > _MOST_STEPS))
    return solution


def _unknowns(
    equation: Equation, changed: Collection[Attribute], fixed: Collection[Attribute]
) -> list[Attribute]:
    """Attributes of an equation that may still change, those with names of head counts first."""
    found = dict.fromkeys(attributes_in(equation.expression))
    unknown = [a for a in found if a not in changed and a not in fixed]
    return sorted(unknown, key=lambda attribute: attribute.name not in HEAD_COUNT_NAMES)


def _reason(
    equations: Sequence[Equation],
    values: Mapping[Attribute, int],
    fixed: Collection[Attribute],
    was_given_up: bool,
) -> str:
    """The reason why no solution of the equations was found, as a clause of an error message."""
    for equation in equations:
        for other in equations:
            if other.expression == equation.expression and other.wanted > equation.wanted:
                return f"{_shown(equation)} must be both {equation.wanted} and {other.wanted}"
    broken = [e for e in equations if evaluate(e.expression, values) != e.wanted]
    for equation in broken:
        if not _unknowns(equation, (), fixed):
            return f"{_shown(equation)} would have to be {equation.wanted}"
    if was_given_up:
        return (
            f"{_shown(broken[0])} would have to be {broken[0].wanted}, and no solution was found "
            f"for all numbers of its code in {_MOST_STEPS} steps"
        )
    return (
        f"{_shown(broken[0])} would have to be {broken[0].wanted}, and other numbers of its code "
        "do not allow that"
    )


def _shown(equation: Equation) -> str:
    """The expression of an equation with its narrow value, for error messages."""
    if isinstance(equation.expression, int):
        return f"the {equation.given} that its code computes"
    return f"{text(equation.expression)} = {equation.given}"
