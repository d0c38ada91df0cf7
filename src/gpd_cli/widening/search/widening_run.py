"""The data that is shared by the parts of a run that widens a network.

These parts are `LayerWidening`, `Containers` and `Following`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from gpd_cli.widening.layers import is_dense
from gpd_cli.widening.layout import Layout, Scale, Segment, layout_map
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.plan import IndexMap
from gpd_cli.widening.search.follow import Following, Frame
from gpd_cli.widening.search.solutions import Solutions
from gpd_cli.widening.search.state import State
from gpd_cli.widening.search.trials import Trials
from gpd_cli.widening.search.wide_network import WideNetwork


class WideningRun:
    """One run of a copy of the student that is widened on the way.

    Args:
        student: the student, in float64 and eval mode.
        recording: the student's run on the probe batch.
        scale: how much wider the network gets.
        keeps_output: names of the layers that keep their output channels.
        allows_multiples: whether activations may be multiples of copies.
        trials: the counter of trials, which also counts the trials of earlier runs.

    Attributes:
        wide: the copy of the student that is widened.
        modules: the student's modules, by name.
        dense: names of the layers whose outputs need not be computed: copies of the student's
            outputs by the layer's index maps are used instead.
        following: adjusts the calls in containers' code to the copies.
        solutions: how attributes have grown, for containers whose code had to be run twice to find
            it.
        state: what the run has seen and decided so far.
        frames: stack of what is running, the outermost first: a frame for a container's own code,
            or None for a layer and for a container between two runs of its code.
        is_confirming: whether the widened network is being run once more, to confirm the plan.
    """

    def __init__(
        self,
        student: nn.Module,
        recording: Recording,
        scale: Scale,
        keeps_output: Collection[str],
        allows_multiples: bool,
        trials: Trials,
    ) -> None:
        self.wide = WideNetwork(student, scale.ratio)
        self.modules = self.wide.modules
        self.recording, self.scale, self.trials = recording, scale, trials
        self.keeps_output = keeps_output
        self.following = Following(self.wide, allows_multiples)
        self.solutions = Solutions(self.modules)
        self.state = State(self.wide.plan)
        self.frames: list[Frame | None] = []
        self.is_confirming = False
        self.dense = {
            name
            for name, module in self.modules.items()
            if is_dense(module)
            and not (module._forward_hooks or module._forward_pre_hooks)
            and f"{name}.weight" not in recording.direct
        }

    @property
    def frame(self) -> Frame | None:
        """The frame of the container whose own code runs; None while other code runs."""
        return self.frames[-1] if self.frames else None

    @contextmanager
    def running(self, frame: Frame | None) -> Iterator[None]:
        """Mark the code that runs within this context.

        Args:
            frame: the frame of the container whose own code runs; None for code whose calls are not
                followed.
        """
        depth = len(self.frames)
        self.frames.append(frame)
        try:
            yield
        finally:
            del self.frames[depth:]  # this also drops the frames of layers that failed

    def restore(self, state: State) -> None:
        """Return to a copy of an earlier state.

        Args:
            state: the earlier state, which later changes of the run leave unchanged.
        """
        self.state = state.copy()
        self.wide.restore(self.state.plan)

    def begin_confirmation(self) -> None:
        """Begin the confirming run: from now on the calls of code are made unchanged."""
        self.is_confirming = True
        self.state.calls, self.frames = {}, []

    def layout(self, layer: str) -> Layout | None:
        """The layout of a layer's outputs; None if the outputs widen as the layer's inputs do."""
        size = self.recording.out_channels.get(layer)
        if layer in self.state.layouts or size is None:
            return self.state.layouts.get(layer)
        return (Segment(size, grows=size > 1),)

    def output_map(self, layer: str) -> IndexMap | None:
        """The index map of a layer's outputs; None if they stay, or widen as the inputs do."""
        layout = self.layout(layer)
        return None if layout is None else layout_map(layout, self.scale)
