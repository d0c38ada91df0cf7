"""Run a container's own code, and widen the attributes and constants that the code reads.

While the code runs, its calls get numbers and constants that fit the copies (`follow`). This leads
to equations, such as that a product of two attributes has to be the wide number of channels. Once
the code has run, the equations are solved for the attributes, tokens and tables that it read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpd_cli.errors import short_text
from gpd_cli.widening.layers import LayerPlan
from gpd_cli.widening.mismatch import Mismatch
from gpd_cli.widening.rules import rule_for
from gpd_cli.widening.running.own_errors import own_errors
from gpd_cli.widening.running.refresh import refresh
from gpd_cli.widening.running.tracing import tensors_in
from gpd_cli.widening.search.follow import Frame
from gpd_cli.widening.search.state import State
from gpd_cli.widening.search.widening_run import WideningRun


@dataclass
class ContainerCall:
    """A call of a container in the wide network.

    Args:
        name: name of the container.
        index: number of the call among the container's calls, from 0.
        forward: the container's own forward.
        args: the positional arguments.
        kwargs: the keyword arguments.

    Attributes:
        state_before: the run's state before the first guess, which is restored after wrong guesses.
        first_mismatch: the mismatch of the first wrong guess; None as long as there is none.
        failed_in_inner_container: whether a guess failed by a mismatch in a container inside.
        frame_of_last_failure: the frame of the latest run in which the container's code or its
            output did not follow the copies; None as long as there is none.
    """

    name: str
    index: int
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state_before: State = field(init=False)
    first_mismatch: Mismatch | None = field(default=None, init=False)
    failed_in_inner_container: bool = field(default=False, init=False)
    frame_of_last_failure: Frame | None = field(default=None, init=False)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments, as a pair."""
        return self.args, self.kwargs


def run_once(run: WideningRun, call: ContainerCall, is_guessed: bool) -> Any:
    """Run a container's own code with the widths of the present state.

    Args:
        run: the shared data of the run.
        call: the container's call.
        is_guessed: whether attributes are guessed, and the code's calls are made unchanged.
            Otherwise the calls are adjusted to the copies, and attributes are solved for.

    Returns:
        What the code returns.

    Raises:
        Mismatch: when the code does not run, when its output does not follow the copies, or when no
            values of its attributes fit.
    """
    name = call.name
    is_settled = name in run.state.settled and not run.is_confirming
    frame = Frame(name, is_guessed, run.recording.events.get((name, call.index), ()))
    try:
        if not is_settled and not run.is_confirming:
            refresh(run.wide.network.get_submodule(name))
        with run.running(frame):
            output = call.forward(*call.args, **call.kwargs)
        with own_errors():
            run.following.matches.check_output(
                name,
                run.recording.outputs[name][call.index],
                tensors_in(output),
                allows_multiples=name in run.state.gives_multiples,
            )
    except Mismatch:
        call.frame_of_last_failure = frame
        raise
    except Exception as error:
        call.frame_of_last_failure = frame
        if is_settled:
            raise  # the container around this one, whose guess is being tried, reports the error
        at_width = "" if run.is_confirming else "at this width "
        reason = f"{at_width}its forward does not run ({short_text(error)})"
        raise Mismatch(name, reason) from error
    if not is_guessed and not run.is_confirming:
        with own_errors():
            run.following.settle(frame, rule_for(run.modules[name]))
    return output


def attempt(run: WideningRun, call: ContainerCall, is_guessed: bool) -> Any:
    """Run a container, and a second time if its code failed before all attributes were solved for.

    The second run has the attributes that follow from the equations of the first. What was solved
    in this way is remembered, and tried first in other containers of the class.

    Args:
        run: the shared data of the run.
        call: the container's call.
        is_guessed: whether attributes are guessed, and the code's calls are made unchanged; if so,
            there is no second run.

    Returns:
        What the code returns.

    Raises:
        Mismatch: when the code does not run, when its output does not follow the copies, or when no
            values of its attributes fit. All that has widened until then stays in the run's state,
            so the caller has to restore an earlier state.
    """
    before = run.state.copy()
    if not is_guessed and (known := run.solutions.of(call.name, before.plan.attributes)):
        for owner, values in known.items():
            run.wide.apply(owner, LayerPlan(attributes=values))
        try:
            return run_once(run, call, is_guessed)
        except Mismatch:
            run.restore(before)
            run.trials.count += 1
    try:
        return run_once(run, call, is_guessed)
    except Mismatch as error:
        is_inside = error.name != call.name and error.name in run.recording.outputs
        if (
            is_guessed
            or is_inside
            or error.needs_other_layout
            or call.frame_of_last_failure is None
        ):
            raise
        run.restore(before)
        if not _settles(run, call.frame_of_last_failure):
            raise
        solved = run.state.copy().plan.attributes
        if error.name != call.name and solved == before.plan.attributes:
            raise  # a second run would fail in the same layer again, since no attribute changes
        run.trials.count += 1
        output = run_once(run, call, is_guessed)
        run.solutions.remember(call.name, before.plan.attributes, solved)
        return output


def _settles(run: WideningRun, frame: Frame) -> bool:
    """Solve the equations of a run that failed, and widen attributes and constants by them.

    Args:
        run: the shared data of the run.
        frame: the frame of the run that failed, with the equations up to the failure.

    Returns:
        Whether the equations have a solution that changes any attribute or constant.
    """
    try:
        return run.following.settle(frame, rule_for(run.modules[frame.name]))
    except Mismatch:
        return False
