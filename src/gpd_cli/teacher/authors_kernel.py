"""The authors' block: teacher and student share each factor of each branch.

With all other branches the student's kernel is a slice of the teacher's merged kernel. In the
authors' code (guoyongcs/GPD) the factors of each branch are sliced, and the student's kernel is
merged from these slices. The two definitions differ only for ``1x1_kxk``, the branch of a 1 x 1
layer followed by a k x k layer: only the first copies of its inner channels enter the student's
kernel. As with other branches, extraction gives the kernel that the student was trained with, to
the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.branches import BranchBank, BranchInit, from_identity, merge
from gpd_cli.branches.initial import MULTIPLIER
from gpd_cli.teacher.kernel import SharedKernel, Sharing
from gpd_cli.widening.plan import IndexMap, TensorPlan, stack
from gpd_cli.widening.tensors import Storage, expand_tensor, replicate


class AuthorsKernel(SharedKernel):
    """The parametrization of a kernel with the authors' block.

    Teacher and student start as the same function: both compute with the student's merged kernel,
    which equals the given kernel only if ``init`` is ``zero``.

    Args:
        kernel: the given kernel of the student, ``[O, I/g, kh, kw]``, whose device and dtype the
            branches get.
        plan: the kernel's plan.
        groups: number of groups of the student's layer.
        wide_groups: number of groups of the teacher's layer.
        names: the branches, see `gpd_cli.branches.AUTHORS_BRANCHES`.
        sharing: how teacher and student share the main kernel.
        storage: the scale at which factors are stored.
        out_axis: the output axis, by whose numbers of copies storage ``teacher`` divides, or None.
        init: initial values of gates and weights.
        generator: random generator of the branches' initial weights.
    """

    identity: Tensor

    def __init__(
        self,
        kernel: Tensor,
        plan: TensorPlan,
        *,
        groups: int,
        wide_groups: int,
        names: tuple[str, ...],
        sharing: Sharing,
        storage: Storage,
        out_axis: int | None,
        init: BranchInit,
        generator: torch.Generator | None,
    ) -> None:
        # As in the authors' code, the student's branches are made first; then each of their
        # tensors is widened.
        bank = BranchBank(
            kernel.shape,
            groups,
            names,
            init=init,
            device=kernel.device,
            dtype=kernel.dtype,
            generator=generator,
        )
        super().__init__(sharing, bank)
        self.groups = groups
        plans = _factor_plans(plan, kernel.shape, groups, wide_groups)
        gates = TensorPlan(plan.axes[:1])
        self.outputs = gates.first_copies
        for name, gate in bank.gates.items():
            bank.gates[name] = nn.Parameter(replicate(gate, gates))
        self.factors = nn.ModuleDict()
        for name, weights in bank.weights.items():
            assert isinstance(weights, nn.ParameterDict)
            shared = nn.ModuleDict()
            for key, narrow in weights.items():
                factor = plans.get((name, key), plan)
                # Depthwise filters do not sum over channels, so they are not divided.
                factor_sharing = Sharing(
                    factor, storage, narrow, None if key == "depthwise" else out_axis
                )
                wide = expand_tensor(narrow, factor)
                factor_sharing.store_(wide, narrow)
                shared[key], weights[key] = factor_sharing, nn.Parameter(wide)
            self.factors[name] = shared
        bank.groups = wide_groups
        bank.filters = replicate(bank.filters, TensorPlan((None, plan.axes[0], None, None)))
        if "1x1_kxk" in bank.weights:
            size = kernel.shape[1]
            eye = from_identity(kernel.new_zeros(groups * size, size, 1, 1), size)
            eye = expand_tensor(eye, plans["1x1_kxk", "deviation"])
            self.register_buffer("identity", eye, persistent=False)

    def both_kernels(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's kernel, merged from wide factors, and the student's, merged from slices."""
        bank = self.branches
        if bank is None:
            return super().both_kernels(stored)
        kernels: tuple[Tensor, Tensor] = self.sharing(stored)
        wide: dict[str, dict[str, Tensor]] = {}
        narrow: dict[str, dict[str, Tensor]] = {}
        for name, factors in bank.factors().items():
            wide[name], narrow[name] = {}, {}
            for key, factor in factors.items():
                wide[name][key], narrow[name][key] = self.factors[name][key](factor)  # type: ignore[index]
        if "1x1_kxk" in wide:
            wide["1x1_kxk"]["identity"] = self.identity
        gates = dict(bank.gates.items())
        own = {name: gate[self.outputs] for name, gate in gates.items()}
        filters = bank.filters[:, *self.outputs]
        return (
            self._averaging(merge(kernels[0], gates, wide, bank.filters, bank.groups)),
            self._averaging(merge(kernels[1], own, narrow, filters, self.groups)),
        )


def _factor_plans(
    plan: TensorPlan, shape: Sequence[int], groups: int, wide_groups: int
) -> dict[tuple[str, str], TensorPlan]:
    """Make plans for those factors that do not widen as the kernel itself does.

    Args:
        plan: the kernel's plan.
        shape: shape of the student's kernel, ``[O, I/g, kh, kw]``.
        groups: number of groups of the student's layer, g.
        wide_groups: number of groups of the teacher's layer: g, or more groups, which are copies.

    Returns:
        Plans by branch name and tensor name.
    """
    (outputs, inputs), fan = plan.axes[:2], shape[1]
    every = None if inputs is None else stack(inputs, groups)  # the channels of all groups
    if wide_groups != groups:
        assert outputs is not None and inputs is None
        width = shape[0] // groups
        copied = [place // width for place in outputs.index[:: len(outputs) // wide_groups]]
        every = IndexMap(groups * fan, tuple(g * fan + i for g in copied for i in range(fan)))
    filters = None
    if inputs is not None:
        index = tuple(i * MULTIPLIER + m for i in inputs.index for m in range(MULTIPLIER))
        filters = IndexMap(fan * MULTIPLIER, index)
    # The product sums over the copies of each inner channel. The division in the 1 x 1 layer makes
    # up for it, also where the k x k kernel itself is only copied.
    divided = None if inputs is None else 1
    return {
        ("1x1_kxk", "deviation"): TensorPlan((every, inputs, None, None), divided),
        ("depthwise_separable", "depthwise"): TensorPlan((every, None, None, None)),
        ("depthwise_separable", "weight"): TensorPlan(
            (outputs, filters, None, None), plan.fan_in, plan.extra_divisor
        ),
    }
