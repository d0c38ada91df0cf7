"""Variables: the attributes, tensors and layouts that may widen in a container.

A container (a module with a forward of its own) reads attributes, tokens and tables, and takes
the outputs of its layers apart. Each of these is a variable. Each variable has a few options (ways
to widen, see `options`), which have labels. Usually only layouts and factors of products have to be
guessed, since numbers and tensors are solved for; if this fails, all variables are guessed.
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
from gpd_cli.widening.search.widening_run import WideningRun

STAYS_NARROW = "narrow"
"""Label of the option, of any variable, to stay as in the student."""

SIDE_BY_SIDE = "side by side"
"""Label of the layout in which the copies of each output are neighbours."""

DIVIDED = "divided"
"""Label of the option that a factor of products is divided by the expansion ratio."""

Option = TypeVar("Option")


@dataclass
class Variable(ABC, Generic[Option]):
    """An attribute, tensor or layout that may widen, with its options.

    Args:
        names: the qualified name of the attribute or tensor, or the names of all layers that have
            the layout.
        options: what the variable becomes, by label.
        first: label of the option to try first.
        counts: by label, the sizes that widen under this option and may be counts (of heads).
        named: whether names in the code tell that the first option widens the number of heads.
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
        """Choose the option to try first, if it is assumed which number of heads widens.

        Args:
            count: the number of heads (or groups) that is assumed to widen; None for none.
            inner: whether the innermost of several axes of this size is assumed to widen.

        Returns:
            The label of the option.
        """
        if self.named:
            return self.first
        labels = [label for label, counts in self.counts.items() if count in counts]
        return labels[-1 if inner else 0] if labels else self.first

    @abstractmethod
    def apply(self, run: WideningRun, label: str) -> None:
        """Apply one of the options to the wide network.

        Args:
            run: the run that widens the network.
            label: one of the labels of `options`.
        """


@dataclass
class NumberVariable(Variable[float | Sequence[int] | None]):
    """An attribute that holds one or several integers, or a factor of products.

    Its options are wide values, or None to keep the narrow value.
    """

    @property
    def is_count(self) -> bool:
        """Whether the attribute has one of the usual names of head counts."""
        return split_name(self.names[0])[1] in HEAD_COUNT_NAMES

    def apply(self, run: WideningRun, label: str) -> None:
        """Set the attribute to the wide value of an option."""
        value = self.options[label]
        if value is not None:
            owner, attribute = split_name(self.names[0])
            run.wide.apply(owner, LayerPlan(attributes={attribute: value}))


@dataclass
class TensorVariable(Variable[TensorPlan | None]):
    """A tensor that a container's code uses directly: a token, a position embedding, a table.

    Its options are tensor plans, or None to stay narrow.
    """

    def apply(self, run: WideningRun, label: str) -> None:
        """Widen the tensor by the plan of an option."""
        plan = self.options[label]
        if plan is not None:
            owner, local = split_name(self.names[0])
            run.wide.apply(owner, LayerPlan({local: plan}))


@dataclass
class LayoutVariable(Variable[Layout]):
    """The layout of the wide outputs of one layer, or of several layers that need the same one."""

    def apply(self, run: WideningRun, label: str) -> None:
        """Decide the layers' layout.

        Copies side by side are what layers have by default. This option decides nothing, so that
        containers inside this one may still decide.
        """
        if label != SIDE_BY_SIDE:
            run.state.layouts.update(dict.fromkeys(self.names, self.options[label]))
