"""Run a copy of the student that is widened on the way, module by module.

Layers widen just before they run (`widen_layers`), containers while their own code runs
(`containers`). At the end the widened network is run once more, to confirm the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpd_cli.errors import short_text
from gpd_cli.widening.layers import is_leaf
from gpd_cli.widening.mismatch import Mismatch
from gpd_cli.widening.names import qualified
from gpd_cli.widening.numbers.arithmetic import Attribute, remember
from gpd_cli.widening.numbers.calls import Call
from gpd_cli.widening.observe.reads import reading
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.running.own_errors import ForwardError, forward_errors, own_errors
from gpd_cli.widening.running.refresh import refresh
from gpd_cli.widening.running.tracing import Tracer
from gpd_cli.widening.search.containers import Containers
from gpd_cli.widening.search.widen_layers import LayerWidening
from gpd_cli.widening.search.widening_run import WideningRun

Confirmation = Literal["copied", "computed"]
"""How the widened network is run once more, to confirm the plan.

In this run the network's code computes all its numbers itself. With ``copied``, the outputs of
dense layers are copies of the student's, as in the widening run. With ``computed``, every layer
computes its output from its wide weights.
"""


class Widening(Tracer):
    """One run of a copy of the student that is widened on the way.

    Args:
        run: the shared data of the run.
        guessed: names of the containers whose numbers are guessed, since solving their equations
            gave wrong numbers.
    """

    def __init__(self, run: WideningRun, guessed: Collection[str] = ()) -> None:
        super().__init__()
        self._run = run
        self._layers = LayerWidening(self._run)
        self._containers = Containers(self._run, guessed)

    @property
    def is_confirming(self) -> bool:
        """Whether the widened network is being run once more, to confirm the plan."""
        return self._run.is_confirming

    @property
    def multiples_might_help(self) -> bool:
        """Whether something stays narrow that multiples of copies might widen."""
        return self._containers.multiples_might_help

    def widen(self, images: Tensor, confirm: Confirmation = "computed") -> WidthPlan:
        """Run the copy on the probe batch, and widen its modules on the way.

        Args:
            images: the probe batch of the student's recorded run, ``[B, C, H, W]``.
            confirm: how to run the widened network once more.

        Returns:
            The plan of all that has widened.

        Raises:
            Mismatch: when a module cannot be widened exactly.
        """
        wide = self._run.wide
        for name, module in wide.network.named_modules():
            if is_leaf(module):
                self._layers.observe(name, module)
            elif getattr(module.forward, "__func__", None) is not nn.Module.forward:
                module.forward = self._containers.widening(name, module.forward)
        with torch.no_grad(), self, reading(wide.network, self._number, self._tensor):
            wide.network(images.clone())
            failure = self._containers.first_failure
            if failure is not None and not wide.plan.tensors:
                raise failure  # a plan in which nothing widens does not help
            wide.drop_idle_attributes()
            self._layers.computes = confirm == "computed"
            self._confirm(images)
        return wide.plan

    def _confirm(self, images: Tensor) -> None:
        """Run the widened network once more, with the calls of its code unchanged.

        Raises:
            Mismatch: when the network does not compute what the student computes.
        """
        self._run.begin_confirmation()
        try:
            with forward_errors():
                refresh(self._run.wide.network)
        except ForwardError as failure:
            reason = f"its train() does not run ({short_text(failure.error)})"
            raise Mismatch("", reason) from failure.error
        self._run.wide.network(images.clone())

    @own_errors()
    def _number(self, owner: str, name: str, value: Any) -> Any:
        """Note which attribute a number comes from that a container's code reads.

        Args:
            owner: name of the module that has the attribute.
            name: name of the attribute.
            value: the attribute's value.

        Returns:
            The value for the code, which remembers the attribute through arithmetic.
        """
        if self._run.frame is None or name.startswith("__"):
            return value
        return remember(Attribute(owner, name), value)

    @own_errors()
    def _tensor(self, owner: str, name: str, value: Tensor) -> Tensor:
        """Return a parameter or buffer that code reads, in its present width.

        Args:
            owner: name of the module that has the tensor.
            name: name of the tensor in the module.
            value: the tensor that the module has.
        """
        full = qualified(owner, name)
        value = self._run.wide.read(full, value)
        if self._run.frame is not None:
            self._run.following.read(full, value)
        return value

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call in a container's code, with numbers, constants and weights for wide tensors.

        Args:
            func: the torch function.
            args: the positional arguments.
            kwargs: the keyword arguments.
        """
        frame = self._run.frame
        if frame is None or self._run.is_confirming:
            return func(*args, **kwargs)
        with own_errors():
            call = Call(func, args, kwargs)
            if not frame.is_guessed:
                call = self._run.following.prepare(frame, call)
            made = self._layers.direct(call)
        result = made.function(*made.args, **made.kwargs)
        with own_errors():
            self._run.following.constants.derive((call.args, call.kwargs), result)
        return result
