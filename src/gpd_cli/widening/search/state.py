"""The state of a run that widens a network, to which a guess that fails returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gpd_cli.widening.layout import Layout
from gpd_cli.widening.match import Match
from gpd_cli.widening.plan import WidthPlan


@dataclass
class State:
    """What a run has seen and decided so far.

    Args:
        plan: what has widened.
        calls: number of calls of each layer and container.
        inputs: per layer the match of its input in its first call.
        layouts: layouts of layers' outputs.
        multiples: per layer the multiple of copies that its outputs have to be, where not 1.
        gives_multiples: containers whose outputs may be multiples of copies.
        settled: containers that have widened; further calls of them make no guesses.
    """

    plan: WidthPlan
    calls: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Match] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    multiples: dict[str, float] = field(default_factory=dict)
    gives_multiples: set[str] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)

    def copy(self) -> State:
        """A state that stays as it is when this one changes."""
        plan = replace(
            self.plan,
            tensors=dict(self.plan.tensors),
            attributes={name: dict(values) for name, values in self.plan.attributes.items()},
            narrow=dict(self.plan.narrow),
        )
        return State(
            plan,
            dict(self.calls),
            dict(self.inputs),
            dict(self.layouts),
            dict(self.multiples),
            set(self.gives_multiples),
            set(self.settled),
        )

    def count_call(self, name: str) -> int:
        """Count a call of a layer or container; the first call has the number 0."""
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        return call
