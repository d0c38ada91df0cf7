"""Variables: attributes, tensors and layouts that may widen in a container, and how they do.

A container (a module with a forward of its own) reads attributes, tokens and tables, and takes
the outputs of its layers apart. Each of these is a variable, with a few options under labels
(`options`). As a rule only layouts and the factors of products are left to decide, since numbers
and tensors are found by arithmetic; where arithmetic fails, all variables are tried.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gpd_cli.widening.layers import LayerPlan
from gpd_cli.widening.layout import Layout
from gpd_cli.widening.names import split_name
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES
from gpd_cli.widening.plan import TensorPlan
from gpd_cli.widening.search.run import Run

NARROW = "narrow"
"""Label of staying as narrow as in the student, of any variable."""

SIDE_BY_SIDE = "side by side"
"""Label of the layout in which the copies of each output are neighbours."""

DIVIDED = "divided"
"""Label of a factor of products that is divided by the expansion ratio."""

Option = TypeVar("Option")


@dataclass
class Variable(ABC, Generic[Option]):
    """An attribute, tensor or layout that may widen, with its options.

    Args:
        names: qualified name of the attribute or tensor, or names of all layers of one layout.
        options: what the variable becomes under each label.
        first: label of the option to try first.
        counts: the sizes that widen under a label and may count something (heads), by label.
        named: whether names in the code say that the first option widens the number of heads.
    """

    names: tuple[str, ...]
    options: dict[str, Option]
    first: str
    counts: dict[str, set[int]] = field(default_factory=dict)
    named: bool = False

    @property
    def is_count(self) -> bool:
        """Whether the variable is an attribute with one of the usual names of head counts."""
        return False

    def preferred(self, count: int | None, inner: bool) -> str:
        """The option to try first under the assumption that a count of some size widens.

        Args:
            count: the size of the count.
            inner: whether the innermost axis of this size widens, where there are several.
        """
        if self.named:
            return self.first
        labels = [label for label, counts in self.counts.items() if count in counts]
        return labels[-1 if inner else 0] if labels else self.first

    @abstractmethod
    def apply(self, run: Run, label: str) -> None:
        """Let the wide network have the option of a label.

        Args:
            run: the run that widens the network.
            label: one of the labels of `options`.
        """


@dataclass
class NumberVariable(Variable[float | Sequence[int] | None]):
    """An attribute that holds one or several integers, or a factor of products.

    Its options are wide values; None for the narrow one.
    """

    @property
    def is_count(self) -> bool:
        """Whether the attribute has one of the usual names of head counts."""
        return split_name(self.names[0])[1] in HEAD_COUNT_NAMES

    def apply(self, run: Run, label: str) -> None:
        """Set the attribute."""
        value = self.options[label]
        if value is not None:
            owner, attribute = split_name(self.names[0])
            run.wide.apply(owner, LayerPlan(attributes={attribute: value}))


@dataclass
class TensorVariable(Variable[TensorPlan | None]):
    """A tensor that a container's code uses directly: a token, a position embedding, a table.

    Its options are plans; None for staying narrow.
    """

    def apply(self, run: Run, label: str) -> None:
        """Widen the tensor."""
        plan = self.options[label]
        if plan is not None:
            owner, local = split_name(self.names[0])
            run.wide.apply(owner, LayerPlan({local: plan}))


@dataclass
class LayoutVariable(Variable[Layout]):
    """The order of the wide outputs of one or several layers, which need the same one."""

    def apply(self, run: Run, label: str) -> None:
        """Settle the layers' layout, but leave one side by side to containers further inside."""
        if label != SIDE_BY_SIDE:
            run.state.layouts.update(dict.fromkeys(self.names, self.options[label]))
