"""Student and dynamic teacher of which each has weights, or norms, of its own."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.plan import WidthPlan


class Unshared(Pair):
    """A pair in which the student keeps weights of its own.

    With `only_norms` these are the affine weights of its norms, and the kernels are shared as in
    every pair: the dynamic teacher's norms scale other activations than the student's. Otherwise
    they are all of the student's weights, which then learns from the teacher through the loss only.
    Both networks start as the same function.

    Args:
        teacher: the wide network.
        student: the narrow network, which this pair takes over with the parameters that are its
            own; the others are removed.
        plan: the student's width plan.
        only_norms: whether the student's own weights are those of its norms alone.

    Attributes:
        own: names of the student's own weights.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, plan: WidthPlan, only_norms: bool = False
    ) -> None:
        parameters = dict(student.named_parameters(remove_duplicate=False))
        norms = {name for name, module in student.named_modules() if is_norm(module)}
        super().__init__(teacher, student, plan)
        self.only_norms = only_norms
        self.own = {
            name
            for name, first in self._tied.items()
            if not only_norms or first.rpartition(".")[0] in norms
        }
        for name in self.own:
            owner, leaf = self._owner(name)
            owner._parameters[leaf] = parameters[name]

    @classmethod
    def of(cls, pair: Pair, only_norms: bool = False) -> Unshared:
        """Copy shared weights of a pair into the student, which then no longer shares them.

        Args:
            pair: student and dynamic teacher that share their weights; not to be used afterwards.
            only_norms: whether only the weights of norms are copied.
        """
        unshared = cls(pair.teacher, pair.extract(), pair.plan, only_norms)
        unshared.certificate = pair.certificate
        return unshared

    def _weights_of_step(self) -> dict[str, Tensor]:
        weights = self._weights()
        self._merge_kernels()  # those that the student has no weights of; the others are cached
        return weights

    def _weight(self, name: str, merged: bool = True) -> Tensor:
        return (
            self.narrow.get_parameter(name) if name in self.own else super()._weight(name, merged)
        )


def without_sharing(pair: Pair, shared: bool, shared_norms: bool) -> Pair:
    """Give the student of a pair those weights of its own that are not to be shared.

    Args:
        pair: student and dynamic teacher that share all weights; not to be used afterwards.
        shared: whether the two share their weights at all.
        shared_norms: whether the two share the weights of norms, too.

    Returns:
        The pair itself if both are true, or if the student has no weights of norms.
    """
    if shared and shared_norms:
        return pair
    unshared = Unshared.of(pair, only_norms=shared)
    return unshared if unshared.own else pair


def is_norm(module: nn.Module) -> bool:
    """Whether a layer is a norm: one of torch, or a class that is called so, of timm or the user.

    Args:
        module: a layer of a plain network.
    """
    if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    # timm's RmsNorm and EvoNorm are derived from Module. A layer with a kernel is none, even if it
    # is called NormedLinear.
    parameters = list(module.parameters(recurse=False))
    return "Norm" in type(module).__name__ and all(p.ndim == 1 for p in parameters)
