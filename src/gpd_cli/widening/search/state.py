"""The state of a run that widens a network; after a wrong guess an earlier state is restored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gpd_cli.widening.layout import Layout
from gpd_cli.widening.match import Match
from gpd_cli.widening.plan import WidthPlan


@dataclass
class State:
    """What a run has seen and decided so far.

    Args:
        plan: the plan of all that has widened so far.
        calls: number of calls of each layer and container so far, by name.
        inputs: the match of each layer's input in the layer's first call, by layer name.
        layouts: the layouts of layers' outputs that have been decided, by layer name.
        output_factors: for layers whose outputs have to be multiples of copies, the number that the
            copies are multiplied by, by layer name.
        gives_multiples: names of the containers whose outputs may be multiples of copies.
        settled: names of the containers that have widened; their further calls make no guesses.
    """

    plan: WidthPlan
    calls: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Match] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    output_factors: dict[str, float] = field(default_factory=dict)
    gives_multiples: set[str] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)

    def copy(self) -> State:
        """Make a copy that does not change when this state changes."""
        plan = replace(
            self.plan,
            tensors=dict(self.plan.tensors),
            attributes={name: dict(values) for name, values in self.plan.attributes.items()},
            kept_narrow=dict(self.plan.kept_narrow),
        )
        return State(
            plan,
            dict(self.calls),
            dict(self.inputs),
            dict(self.layouts),
            dict(self.output_factors),
            set(self.gives_multiples),
            set(self.settled),
        )

    def count_call(self, name: str) -> int:
        """Count a call of a layer or container; the first call has the number 0."""
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        return call
