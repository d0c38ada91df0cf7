"""Integers that remember which attributes of which modules they were computed from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


@dataclass(frozen=True)
class Attribute:
    """An attribute of a module that holds an integer, or one entry of a tuple or list of integers.

    Args:
        owner: qualified name of the module; empty for the network itself.
        name: name of the attribute.
        entry: position in the tuple or list; None if the attribute is the integer itself.
    """

    owner: str
    name: str
    entry: int | None = None

    def __str__(self) -> str:
        entry = "" if self.entry is None else f"[{self.entry}]"
        return f"{self.owner}.{self.name}{entry}" if self.owner else f"{self.name}{entry}"


@dataclass(frozen=True)
class Operation:
    """An arithmetic operation on two expressions.

    Args:
        sign: ``+``, ``-``, ``*``, ``//`` or ``%``.
        left: the first operand.
        right: the second operand.
    """

    sign: str
    left: Expression
    right: Expression


Expression = Attribute | Operation | int
"""How an integer was computed from attributes and plain integers."""


class Number(int):
    """An integer that remembers the expression that it was computed by.

    Sums, differences, products, integer quotients and remainders with other integers are again
    instances of `Number`. All other operations return plain values.

    Example:
        >>> dim, heads = Attribute("attn", "dim"), Attribute("attn", "num_heads")
        >>> head_dim = Number(192, dim) // Number(6, heads)
        >>> head_dim, text(head_dim.expression)
        (32, 'self.dim // self.num_heads')
    """

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> Number:
        """Make a number from a value and its expression."""
        number = super().__new__(cls, value)
        number.expression = expression
        return number

    def __reduce__(self) -> tuple[Any, ...]:  # copies of a module hold plain integers
        return int, (int(self),)

    def __neg__(self) -> Any:
        return 0 - self


def _operator(sign: str, reflected: bool) -> Callable[[Number, Any], Any]:
    operation = _OPERATIONS[sign]

    def apply(self: Number, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        value = operation(int(left), int(right))
        return Number(value, Operation(sign, expression_of(left), expression_of(right)))

    return apply


for _sign, _name in (
    ("+", "add"),
    ("-", "sub"),
    ("*", "mul"),
    ("//", "floordiv"),
    ("%", "mod"),
):
    setattr(Number, f"__{_name}__", _operator(_sign, reflected=False))
    setattr(Number, f"__r{_name}__", _operator(_sign, reflected=True))


def expression_of(value: int) -> Expression:
    """The expression of a number; a plain integer is its own expression."""
    return value.expression if isinstance(value, Number) else int(value)


def remember(attribute: Attribute, value: Any) -> Any:
    """Replace each integer in the value of an attribute by a `Number`.

    Args:
        attribute: the attribute that holds the value.
        value: an integer, or a tuple or list of integers; other values are returned unchanged.
    """
    if type(value) is int:
        return Number(value, attribute)
    if type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        owner, name = attribute.owner, attribute.name
        return type(value)(Number(v, Attribute(owner, name, k)) for k, v in enumerate(value))
    return value


def attributes_in(expression: Expression) -> Iterator[Attribute]:
    """The attributes in an expression, each as often as it occurs there."""
    if isinstance(expression, Attribute):
        yield expression
    elif isinstance(expression, Operation):
        yield from attributes_in(expression.left)
        yield from attributes_in(expression.right)


def evaluate(expression: Expression, values: Mapping[Attribute, int]) -> int | None:
    """Compute the value of an expression; None for a division by zero.

    Args:
        expression: the expression.
        values: the values of all attributes in the expression.

    Example:
        >>> heads, width = Attribute("attn", "num_heads"), Attribute("attn", "head_dim")
        >>> evaluate(Operation("*", heads, width), {heads: 12, width: 32})
        384
    """
    if isinstance(expression, int):
        return expression
    if isinstance(expression, Attribute):
        return values[expression]
    left, right = evaluate(expression.left, values), evaluate(expression.right, values)
    if left is None or right is None or (right == 0 and expression.sign in ("//", "%")):
        return None
    return _OPERATIONS[expression.sign](left, right)


def invert(
    expression: Expression, wanted: int, attribute: Attribute, values: Mapping[Attribute, int]
) -> int | None:
    """Find the value of an attribute for which an expression has a wanted value.

    Args:
        expression: an expression in which the attribute occurs once.
        wanted: the wanted value of the expression.
        attribute: the attribute to solve for.
        values: the values of all other attributes in the expression.

    Returns:
        The attribute's value, or None if no integer is found. Integer quotients are assumed to
        leave no remainder.

    Example:
        >>> heads, width = Attribute("attn", "num_heads"), Attribute("attn", "dim")
        >>> quotient = Operation("//", width, heads)
        >>> invert(quotient, 32, width, {heads: 6})
        192
    """
    if isinstance(expression, Attribute):
        return wanted if expression == attribute else None
    if isinstance(expression, int):
        return None
    inside_left = attribute in attributes_in(expression.left)
    inner, outer = expression.left, expression.right
    if not inside_left:
        inner, outer = outer, inner
    if attribute in attributes_in(outer):
        return None
    known = evaluate(outer, values)
    if known is None:
        return None
    target = _inverse(expression.sign, wanted, known, inside_left)
    return None if target is None else invert(inner, target, attribute, values)


def _inverse(sign: str, wanted: int, known: int, unknown_is_left: bool) -> int | None:
    """Find the unknown operand of an operation, or None.

    Args:
        sign: sign of the operation.
        wanted: the wanted result of the operation.
        known: the other operand.
        unknown_is_left: whether the unknown operand is the left one.
    """
    if sign == "+":
        return wanted - known
    if sign == "-":
        return wanted + known if unknown_is_left else known - wanted
    if sign == "*":
        return wanted // known if known and wanted % known == 0 else None
    if sign == "//" and unknown_is_left:
        return wanted * known
    if sign == "//":
        return known // wanted if wanted and known % wanted == 0 else None
    return None


def text(expression: Expression) -> str:
    """Write an expression as code in ``forward``, such as ``self.dim // self.num_heads``.

    Args:
        expression: the expression; its attributes are named without their modules.
    """
    if isinstance(expression, int):
        return str(expression)
    if isinstance(expression, Attribute):
        entry = "" if expression.entry is None else f"[{expression.entry}]"
        return f"self.{expression.name}{entry}"
    sides = (
        f"({text(side)})" if isinstance(side, Operation) else text(side)
        for side in (expression.left, expression.right)
    )
    return f" {expression.sign} ".join(sides)
