"""Widen containers, by running their code with one guess after the other until one is exact.

A container is a module with a `forward` of its own that is no layer. The layouts of the layers
inside are guessed, the likeliest first. The attributes, tokens and tables that the code reads are
solved for (`attempt`), and guessed only where the solution is wrong. A right guess is remembered
for other modules of the class. If no guess is exact, layers inside the container are kept narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from gpd_cli.widening.layout import Layout, Segment, layout_map
from gpd_cli.widening.mismatch import Mismatch, UnfitMultiple
from gpd_cli.widening.names import is_inside, local_name, qualified
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.plan import IndexMap
from gpd_cli.widening.running.own_errors import own_errors
from gpd_cli.widening.running.tracing import replace_tensors, tensors_in
from gpd_cli.widening.search.attempt import ContainerCall, attempt, run_once
from gpd_cli.widening.search.choices import Choices, MapsInUse
from gpd_cli.widening.search.cut_layouts import cut_layouts
from gpd_cli.widening.search.output_factors import output_factor
from gpd_cli.widening.search.trial_order import Guess, counts_in, ordered_guesses
from gpd_cli.widening.search.trials import MOST_TRIALS
from gpd_cli.widening.search.variables import Variable
from gpd_cli.widening.search.widening_run import WideningRun

# The most trials of a container after a mismatch that only other layouts may resolve.
_MOST_TRIALS_OF_LAYOUTS = 4


class Containers:
    """Widens the containers of a run.

    Args:
        run: the shared data of the run.
        guessed: names of the containers whose numbers are guessed, since solving their equations
            gave wrong numbers.

    Attributes:
        first_failure: the first mismatch of the first container that was kept narrow; None if no
            container was.
        multiples_might_help: whether something stays narrow that multiples of copies might widen.
    """

    def __init__(self, run: WideningRun, guessed: Collection[str]) -> None:
        self._run = run
        self._guessed = guessed
        self._choices = Choices(run.wide, run.recording, run.scale, run.keeps_output)
        self._remembered: dict[type, list[Mapping[str, str]]] = {}
        self._failed_classes: set[type] = set()
        self.first_failure: Mismatch | None = None
        self.multiples_might_help = False

    def widening(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a container's forward, so that the container widens while it runs.

        Args:
            name: name of the container.
            forward: the container's own forward.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            state = self._run.state
            call = ContainerCall(name, state.count_call(name), forward, args, kwargs)
            if call.index >= len(self._run.recording.outputs.get(name, [])):
                return forward(*args, **kwargs)
            with self._run.running(None):
                if self._run.is_confirming or name in state.settled:
                    return run_once(self._run, call, is_guessed=False)
                # Errors of the network's code become mismatches, so any other error is gpd's own.
                with own_errors(), self._run.trials.of_container():
                    return self._search(call)

        return run

    # The search: one strategy after the other

    def _search(self, call: ContainerCall) -> Any:
        """Run a container by one strategy after the other, until one is exact.

        Raises:
            Mismatch: the first mismatch, when no strategy is exact.
        """
        call.state_before = self._run.state.copy()
        for strategy in self._strategies(call):
            with suppress(Mismatch):
                return strategy(call)
        assert call.first_mismatch is not None
        raise call.first_mismatch

    def _strategies(self, call: ContainerCall) -> Iterator[Callable[[ContainerCall], Any]]:
        """The strategies for a container, each chosen by how the strategies before it failed."""
        if call.name not in self._guessed:
            yield partial(self._guess, is_guessed=False)
        failure = call.first_mismatch
        if failure is None or not (call.failed_in_inner_container or failure.needs_other_layout):
            yield partial(self._guess, is_guessed=True)
        failure = call.first_mismatch
        assert failure is not None
        self._failed_classes.add(self._class(call.name))
        if call.name and isinstance(failure, UnfitMultiple) and failure.name == call.name:
            yield partial(self._attempt_with, gives_multiples=True)
        yield self._keep_narrow
        recording = self._run.recording
        if inner_layers(recording, call.name, with_gates=True) != inner_layers(
            recording, call.name
        ):
            yield partial(self._keep_narrow, with_gates=True)

    def _guess(self, call: ContainerCall, is_guessed: bool) -> Any:
        """Run a container with one guess after the other.

        Args:
            call: the container's call.
            is_guessed: whether numbers and tensors are guessed as well. Otherwise they are solved
                for, and only layouts and factors are guessed.

        Raises:
            Mismatch: the first mismatch, when no guess is exact.
        """
        variables, guesses = self._guesses(call, solved=not is_guessed)
        for guess in guesses:
            if call.first_mismatch is not None and self._run.trials.are_spent(self._limit(call)):
                break
            try:
                return self._attempt_guess(call, variables, guess, is_guessed)
            except Mismatch as mismatch:
                is_first = call.first_mismatch is None
                call.first_mismatch = call.first_mismatch or mismatch
                call.failed_in_inner_container |= self._is_container_inside(
                    mismatch.name, call.name
                )
            self._run.trials.count += 1
            self._run.restore(call.state_before)
            if is_first:
                with suppress(Mismatch):
                    return self._follow_from_failure(call)
        assert call.first_mismatch is not None
        raise call.first_mismatch

    def _limit(self, call: ContainerCall) -> int:
        """The largest number of trials of a container, which depends on its first mismatch."""
        if self._class(call.name) in self._failed_classes:
            return 1
        failure = call.first_mismatch
        if failure is not None and failure.needs_other_layout:
            return _MOST_TRIALS_OF_LAYOUTS
        return MOST_TRIALS

    def _guesses(
        self, call: ContainerCall, *, solved: bool
    ) -> tuple[list[Variable[Any]], Iterator[Guess]]:
        """The variables of a container, and the guesses of them to try, the likeliest first.

        Args:
            call: the container's call.
            solved: whether numbers and tensors are solved for, so that they are not guessed.
        """
        name, layouts = call.name, self._run.state.layouts
        maps_in_use = partial(self._maps_in_use, call)
        variables = self._choices.variables(name, maps_in_use, layouts, solved=solved)
        remembered = [
            {qualified(name, local): label for local, label in labels.items()}
            for labels in self._remembered.get(self._class(name), ())
        ]
        counts = counts_in(variables, self._run.recording.reads.get(name))
        return variables, ordered_guesses(variables, counts, remembered)

    def _attempt_guess(
        self,
        call: ContainerCall,
        variables: Sequence[Variable[Any]],
        guess: Guess,
        is_guessed: bool,
    ) -> Any:
        """Run a container with a guess, and remember the guess if it is exact.

        Args:
            call: the container's call.
            variables: the variables of the container.
            guess: one label for each variable.
            is_guessed: whether numbers and tensors are guessed as well.
        """
        for variable, label in zip(variables, guess, strict=True):
            variable.apply(self._run, label)
        output = attempt(self._run, call, is_guessed)
        if not call.name and call.first_mismatch is not None and not self._run.wide.plan.tensors:
            raise call.first_mismatch  # a plan in which nothing widens does not help
        self._run.state.settled.add(call.name)
        self._run.trials.found()
        labels = {
            local_name(variable.names[0], call.name): label
            for variable, label in zip(variables, guess, strict=True)
        }
        known = self._remembered.setdefault(self._class(call.name), [])
        if labels not in known:
            known.insert(0, labels)
        return output

    def _maps_in_use(self, call: ContainerCall) -> MapsInUse:
        """The index maps in use in a container, and the sizes of input axes that stay."""
        run, name = self._run, call.name
        known: dict[int, list[IndexMap]] = {}

        def add(map_: IndexMap | None) -> None:
            if map_ is not None and map_ not in known.setdefault(map_.narrow_size, []):
                known[map_.narrow_size].append(map_)

        fixed: set[int] = set()
        recorded = run.recording.inputs.get(name, [])[call.index]
        for narrow, wide in zip(recorded, tensors_in(call.arguments), strict=False):
            axes = run.following.matches.axes(name, narrow, wide)
            for size, map_ in zip(narrow.shape, axes, strict=True):
                add(map_)
                fixed.update({size} if map_ is None else ())
        for layer, size in run.recording.out_channels.items():
            if is_inside(layer, name) and layer not in run.keeps_output and size > 1:
                add(layout_map((Segment(size),), run.scale))
        return known, fixed

    # Strategies that a failure suggests

    def _attempt_with(
        self,
        call: ContainerCall,
        layouts: Mapping[str, Layout] | None = None,
        output_factors: Mapping[str, float] | None = None,
        gives_multiples: bool = False,
    ) -> Any:
        """Run a container with given layouts or output factors, instead of a guess.

        Args:
            call: the container's call.
            layouts: layouts of layers' outputs, by layer name.
            output_factors: for layers whose outputs have to be multiples of copies, the number
                that the copies are multiplied by, by layer name.
            gives_multiples: whether the outputs of the container may be multiples of copies.
        """
        state = self._run.state
        state.layouts.update(layouts or {})
        state.output_factors.update(output_factors or {})
        state.gives_multiples.update({call.name} if gives_multiples else ())
        try:
            output = attempt(self._run, call, is_guessed=False)
        except Mismatch:
            self._run.trials.count += 1
            self._run.restore(call.state_before)
            raise
        self._run.state.settled.add(call.name)
        return output

    def _follow_from_failure(self, call: ContainerCall) -> Any:
        """Run a container with the layouts or output factors that its first mismatch suggests.

        Raises:
            Mismatch: when there are none, or the run with them fails.
        """
        assert call.first_mismatch is not None
        if call.first_mismatch.needs_other_layout:
            if layouts := self._layouts_by_cuts(call):
                return self._attempt_with(call, layouts)
        elif call.first_mismatch.tensors is not None:
            run = self._run
            inside = {n: run.modules[n] for n in run.dense if is_inside(n, call.name)}
            output_factors = output_factor(
                run.recording, inside, run.output_map, *call.first_mismatch.tensors
            )
            if output_factors:
                return self._attempt_with(call, output_factors=output_factors)
        raise call.first_mismatch

    def _layouts_by_cuts(self, call: ContainerCall) -> dict[str, Layout]:
        """Find layouts for layers whose outputs the container's code shuffles or cuts unevenly.

        Returns:
            Layouts by layer name; empty if there are none, or they are the present ones.
        """
        run, name = self._run, call.name
        usual = {layer: run.output_map(layer) for layer in run.recording.out_channels}
        sizes = {
            local_name(layer, name): size
            if layer in run.keeps_output or (map_ := usual[layer]) is None
            else len(map_)
            for layer, size in run.recording.out_channels.items()
            if is_inside(layer, name)
        }
        wide = list(tensors_in(call.arguments))
        recorded = run.recording.inputs.get(name, [])[call.index]
        students = {id(w): n.clone() for w, n in zip(wide, recorded, strict=False)}
        found = cut_layouts(
            run.modules[name],
            replace_tensors(call.arguments, students),
            replace_tensors(call.arguments, {id(w): w.clone() for w in wide}),
            sizes,
        )
        layouts = {qualified(name, layer): layout for layer, layout in found.items()}
        other = any(layout_map(layout, run.scale) != usual[n] for n, layout in layouts.items())
        return layouts if other else {}

    def _keep_narrow(self, call: ContainerCall, with_gates: bool = False) -> Any:
        """Keep layers inside the container narrow, as the last resort.

        Args:
            call: the container's call.
            with_gates: whether those layers stay narrow, too, that end a path in the container and
                have another number of channels than its outputs, as gates have.

        Raises:
            Mismatch: when narrow layers do not help either, or there are no such layers.
        """
        run, name, failure = self._run, call.name, call.first_mismatch
        assert failure is not None
        matches = run.following.matches
        if failure.tensors is not None and matches.matches_as_multiple_only(*failure.tensors):
            self.multiples_might_help = True
        if self._is_container_inside(failure.name, name) or isinstance(failure, UnfitMultiple):
            if with_gates:
                raise failure  # gates of this container cannot be the cause
            children = [child for child, _ in run.modules[name].named_children()]
            layouts = stream_layers(run.recording, name, children)
        else:
            layouts = inner_layers(run.recording, name, with_gates)
        if not name or not layouts:
            raise failure
        where = "" if failure.name == name else f"in {failure.name}, "
        run.wide.plan.kept_narrow[name] = f"{where}{failure.reason}"
        output = self._attempt_with(call, layouts)
        self.first_failure = self.first_failure or failure
        return output

    def _is_container_inside(self, inner: str, name: str) -> bool:
        return inner in self._run.recording.outputs and is_inside(inner, name)

    def _class(self, name: str) -> type:
        return type(self._run.modules[name])


def inner_layers(recording: Recording, name: str, with_gates: bool = False) -> dict[str, Layout]:
    """Make narrow layouts for those layers in a container whose outputs do not leave the container.

    Args:
        recording: the student's run.
        name: name of the container.
        with_gates: whether to include layers that end a path in the container and have a number of
            channels that no axis of its outputs has. This is a guess: such a layer may be a gate,
            but also one whose output is concatenated or flattened.
    """
    ends = recording.ends.get(name, set())
    if with_gates:
        sizes = {n for call in recording.outputs.get(name, ()) for t in call for n in t.shape[1:]}
        ends = {layer for layer in ends if recording.out_channels.get(layer) in sizes}
    return _narrow_layouts(recording, name, recording.out_channels.keys() - ends)


def stream_layers(recording: Recording, name: str, children: Iterable[str]) -> dict[str, Layout]:
    """Make narrow layouts for the layers whose outputs leave a child of the container.

    Other layers whose outputs are added to the outputs of such a layer are included.

    Args:
        recording: the student's run.
        name: name of the container.
        children: names of the container's children.
    """
    stream = set().union(*(recording.ends.get(qualified(name, child), set()) for child in children))
    while added := [layers for layers in recording.sums if layers & stream and layers - stream]:
        stream = stream.union(*added)
    return _narrow_layouts(recording, name, stream)


def _narrow_layouts(recording: Recording, name: str, layers: Iterable[str]) -> dict[str, Layout]:
    return {
        layer: (Segment(recording.out_channels[layer], grows=False),)
        for layer in layers
        if is_inside(layer, name) and layer in recording.out_channels
    }
