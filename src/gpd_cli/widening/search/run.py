"""What the parts of a run that widens a network share: layers, containers and the calls of code."""

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


class Run:
    """One run of a copy of the student that is widened on the way.

    Args:
        narrow: the student, float64, in eval mode.
        recording: the student's run on the probe batch.
        scale: how much wider the network gets.
        keeps_output: layers that keep their output channels.
        multiples: whether activations may be multiples of copies.
        trials: counts the trials, with those of earlier runs.

    Attributes:
        wide: the copy.
        modules: the student's modules, by name.
        dense: layers whose outputs are copied from the student's, since they follow from the
            layers' index maps.
        following: makes the calls in containers' code follow the copies.
        solutions: how attributes have grown that a container's code had to be run twice for.
        state: what the run has seen and decided so far.
        frames: what is running, the outermost first: the frame of a container's own code, or None
            for a layer and for a container between two runs of its code.
        is_confirming: whether the widened network is run once more, with its calls unchanged.
    """

    def __init__(
        self,
        narrow: nn.Module,
        recording: Recording,
        scale: Scale,
        keeps_output: Collection[str],
        multiples: bool,
        trials: Trials,
    ) -> None:
        self.wide = WideNetwork(narrow, scale.ratio)
        self.modules = self.wide.modules
        self.recording, self.scale, self.trials = recording, scale, trials
        self.keeps_output = keeps_output
        self.following = Following(self.wide, multiples)
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
        """Mark the code within this context as a container's own, or with None as unobserved."""
        depth = len(self.frames)
        self.frames.append(frame)
        try:
            yield
        finally:
            del self.frames[depth:]  # with the frames of layers that failed

    def restore(self, state: State) -> None:
        """Return to an earlier state, which stays as it is."""
        self.state = state.copy()
        self.wide.restore(self.state.plan)

    def begin_confirmation(self) -> None:
        """From now on make the calls of code unchanged, and compare what comes out of them."""
        self.is_confirming = True
        self.state.calls, self.frames = {}, []

    def layout(self, layer: str) -> Layout | None:
        """The layout of a layer's outputs; None for a layer whose outputs follow its inputs."""
        size = self.recording.out_channels.get(layer)
        if layer in self.state.layouts or size is None:
            return self.state.layouts.get(layer)
        return (Segment(size, grows=size > 1),)

    def output_map(self, layer: str) -> IndexMap | None:
        """The index map of a layer's outputs; None where they stay, or follow the inputs."""
        layout = self.layout(layer)
        return None if layout is None else layout_map(layout, self.scale)
