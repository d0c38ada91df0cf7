"""Build the dynamic teacher from a student and a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from gpd_cli.branches import (
    ALL_LAYERS,
    MAIN_GATE,
    BranchBank,
    BranchInit,
    branched_layers,
    identity_channels,
)
from gpd_cli.errors import ExpansionError
from gpd_cli.teacher.authors_kernel import AuthorsKernel
from gpd_cli.teacher.kernel import SharedKernel, Sharing
from gpd_cli.teacher.pair import Pair, tied_names
from gpd_cli.widening.plan import TensorPlan, WidthPlan
from gpd_cli.widening.running.copying import copy_network
from gpd_cli.widening.tensors import Storage, expand_tensor


def widen_module(
    network: nn.Module,
    plan: WidthPlan,
    *,
    noise: float = 0.0,
    without_noise: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> None:
    """Widen a network in place: attributes, parameters and buffers.

    The wide weights are at the teacher's scale. Modules keep their class, hooks, ``eps`` and
    momentum; only sizes change.

    Args:
        network: a copy of the student.
        plan: the student's width plan.
        noise: size of the zero-sum noise (see `expand_tensor`).
        without_noise: names of modules whose own weights get no noise.
        generator: random generator of the noise.
    """
    for name, attributes in plan.attributes.items():
        module = network.get_submodule(name)
        for key, value in attributes.items():
            # A plan from a file has tuples, where the network's attribute may be a list.
            old = getattr(module, key)
            setattr(module, key, list(value) if isinstance(old, list) else value)
    for name, tensor_plan in plan:
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        tensor = getattr(module, leaf)
        # In float64 the noise cancels to 1e-15; it is rounded to the tensor's dtype afterwards.
        exact = tensor.detach().double() if noise and tensor.is_floating_point() else tensor
        size = 0.0 if owner in without_noise else noise
        wide = expand_tensor(exact, tensor_plan, noise=size, generator=generator)
        wide = wide.to(tensor.dtype)
        if leaf in module._buffers:
            module._buffers[leaf] = wide
        else:
            module._parameters[leaf] = nn.Parameter(wide, tensor.requires_grad)


def check_plan(student: nn.Module, plan: WidthPlan) -> None:
    """Check that a plan fits a student.

    Args:
        student: the student.
        plan: a width plan, perhaps that of another network.

    Raises:
        ExpansionError: when the student lacks a tensor of the plan or has it in another size, or
            when the plan leaves one of the student's channels without a copy.
    """
    tensors: dict[str, torch.Tensor] = dict(student.named_buffers(remove_duplicate=False))
    tensors.update(student.named_parameters(remove_duplicate=False))
    for name, tensor_plan in plan:
        axes = [axis for axis in tensor_plan.axes if axis is not None]
        if not all(axis.is_onto() for axis in axes):
            raise ExpansionError(
                f"The plan leaves channels of {name} without a copy; find a new plan with "
                "find_plan."
            )
        planned = [None if axis is None else axis.narrow_size for axis in tensor_plan.axes]
        shape = list(tensors[name].shape) if name in tensors else None
        if shape is None or len(shape) != len(planned):
            fits = False
        else:
            fits = all(p is None or p == s for p, s in zip(planned, shape, strict=True))
        if not fits:
            raise ExpansionError(
                f"The plan is for another network: it has {name} of shape {planned}, but "
                f"{type(student).__name__} has {shape}; find a new plan with find_plan."
            )


def build_pair(
    student: nn.Module,
    plan: WidthPlan,
    *,
    branches: Sequence[str] = (),
    branch_layers: Sequence[str] = ALL_LAYERS,
    branch_init: BranchInit = "zero",
    branch_width: float = 1.0,
    noise: float = 0.0,
    without_noise: Collection[str] = (),
    storage: Storage = "mixed",
    generator: torch.Generator | None = None,
) -> Pair:
    """Grow the dynamic teacher out of a student and pair the two.

    Args:
        student: the network to expand; only a copy of it is changed.
        plan: the student's width plan.
        branches: names of the extra branches; each layer gets those that it accepts.
        branch_layers: which layers get branches, see `gpd_cli.branches.branched_layers`.
        branch_init: initial values of the branches. ``zero``: gates of zero, which leave every
            kernel unchanged to the last bit. ``orepa``: gates of OREPA; the initial branches are
            subtracted from the main kernels, so that both networks are unchanged up to rounding.
            ``gpd``: both networks start as the function of the merged branches.
        branch_width: number of inner channels of the ``1x1_kxk`` branch, relative to the paper's.
        noise: size of the zero-sum noise (see `expand_tensor`).
        without_noise: names of modules whose own weights get no noise.
        storage: the scale at which shared kernels are stored.
        generator: random generator of the noise and of the branches' initial weights.

    Returns:
        The pair; each of its modules is in the mode (train or eval) of the student's module.

    Raises:
        GpdError: when `branch_layers` names a layer that the student does not have.
    """
    taken = branched_layers(student, branches, branch_layers)
    narrow = dict(student.named_parameters(remove_duplicate=False))
    # Tensors that the widening replaces right away are not copied.
    buffers = dict(student.named_buffers(remove_duplicate=False))
    teacher = copy_network(student, [t for n, t in (narrow | buffers).items() if n in plan.tensors])
    widen_module(teacher, plan, noise=noise, without_noise=without_noise, generator=generator)
    kernels: dict[str, SharedKernel] = {}
    for name, first in tied_names(student).items():
        owner, _, leaf = name.rpartition(".")
        module = teacher.get_submodule(owner)
        if first != name:
            plans = [plan.tensors[tied] for tied in (first, name) if tied in plan.tensors]
            if len(plans) == 2 and plans[0] != plans[1]:
                raise ExpansionError(
                    f"{first} and {name} are one weight, which would have to widen in two ways; "
                    "give each layer a weight of its own."
                )
            _tie(teacher, module, leaf, first, kernels)
            continue
        parameter, tensor_plan = getattr(module, leaf), plan.tensors.get(name)
        # A frozen kernel gets no branches: they would be trained, but the kernel has to stay.
        takes = leaf == "weight" and parameter.requires_grad
        extra = taken.get(owner, ()) if takes else ()
        tensor_plan = tensor_plan or TensorPlan((None,) * parameter.ndim)
        out_axis = output_axis(student, plan, name)
        sharing = Sharing(tensor_plan, storage, parameter, out_axis)
        if not extra and sharing.is_plain:
            continue
        sharing.store_(parameter, narrow[name])
        if MAIN_GATE in extra:
            kernels[name] = AuthorsKernel(
                narrow[name].detach(),
                tensor_plan,
                groups=getattr(student.get_submodule(owner), "groups", 1),
                wide_groups=getattr(module, "groups", 1),
                names=extra,
                sharing=sharing,
                storage=storage,
                out_axis=out_axis,
                init=branch_init,
                generator=generator,
            )
        else:
            bank = None
            if extra:
                bank = _branch_bank(
                    parameter,
                    tensor_plan,
                    narrow[name],
                    module,
                    extra,
                    branch_init,
                    branch_width,
                    generator,
                )
                if branch_init != "zero":
                    with torch.no_grad():
                        parameter.copy_(bank.absorb(parameter))
            kernels[name] = SharedKernel(sharing, bank)
        # `unsafe` skips a check of shapes, right by construction, that would merge every kernel.
        parametrize.register_parametrization(module, leaf, kernels[name], unsafe=True)
        module.parametrizations.train(module.training)  # type: ignore[union-attr]
    return Pair(teacher, copy_network(student, narrow.values()), plan)


def output_axis(student: nn.Module, plan: WidthPlan, name: str) -> int | None:
    """The output axis of a parameter whose copies storage ``teacher`` divides by.

    As in the authors' code, weights that sum over input channels have such an axis, and so have
    their biases. There is none for depthwise kernels, groups that are copied as a whole, norms,
    tokens, and kernels that are standardized before use.

    Args:
        student: the student.
        plan: the student's width plan.
        name: name of a parameter.

    Returns:
        The number of the axis, or None where nothing is divided.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf.endswith("bias"):
        weight = f"{name.removesuffix('bias')}weight"
        return None if output_axis(student, plan, weight) is None else 0
    tensor_plan = plan.tensors.get(name)
    if tensor_plan is None or len(tensor_plan.axes) < 2:
        return None
    if tensor_plan.fan_in is not None:
        return 1 - tensor_plan.fan_in
    module = student.get_submodule(owner)
    in_axis = int(not isinstance(module, _ConvTransposeNd))
    dense = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)
    # The layer is a stem, whose input channels (those of the images) have no copies.
    return 1 - in_axis if dense and tensor_plan.axes[in_axis] is None else None


def _branch_bank(
    wide: nn.Parameter,
    plan: TensorPlan,
    narrow: torch.Tensor,
    module: nn.Module,
    names: Sequence[str],
    init: BranchInit,
    width: float,
    generator: torch.Generator | None,
) -> BranchBank:
    """Make the branches of a wide kernel.

    Args:
        wide: the wide kernel, ``[O', I'/g, kh, kw]`` or ``[O', I']``.
        plan: the kernel's plan.
        narrow: the student's kernel, ``[O, I/g, kh, kw]`` or ``[O, I]``.
        module: the wide layer.
        names: names of the extra branches.
        init: initial values of gates and weights.
        width: number of inner channels of the ``1x1_kxk`` branch, relative to the paper's.
        generator: random generator of the initial weights.
    """
    channels = None
    if "identity" in names:
        outputs, inputs = (
            range(size) if axis is None else axis.index
            for size, axis in zip(narrow.shape[:2], plan.axes, strict=False)
        )
        channels = identity_channels(outputs, inputs, narrow.shape[1])
    return BranchBank(
        wide.shape,
        getattr(module, "groups", 1),
        names,
        init=init,
        width=width,
        channels=channels,
        device=wide.device,
        dtype=torch.float64,  # so that the weights do not depend on the type of the network
        generator=generator,
    ).to(wide.dtype)


def _tie(
    teacher: nn.Module, module: nn.Module, leaf: str, first: str, kernels: dict[str, SharedKernel]
) -> None:
    """Tie the weight of a wide layer to another layer's weight, as it is tied in the student.

    Args:
        teacher: the wide network.
        module: the layer whose weight is replaced by the other layer's weight.
        leaf: name of the weight in `module`.
        first: qualified name of the other layer's weight.
        kernels: the parametrizations made so far, by qualified weight name.
    """
    owner, _, first_leaf = first.rpartition(".")
    source = teacher.get_submodule(owner)
    if first not in kernels:
        module._parameters[leaf] = source._parameters[first_leaf]
        return
    parametrize.register_parametrization(module, leaf, kernels[first], unsafe=True)
    shared = source.parametrizations[first_leaf].original  # type: ignore[index, union-attr]
    module.parametrizations[leaf].original = shared  # type: ignore[index, union-attr]


def merged_teacher(pair: Pair) -> nn.Module:
    """Make a plain copy of the dynamic teacher: a wide module of the student's class.

    Its branches are merged, and it has no parametrizations.

    Args:
        pair: student and dynamic teacher.
    """
    return merged_networks(pair)[1]


def merged_networks(pair: Pair) -> tuple[nn.Module, nn.Module]:
    """Make plain copies of both networks, and merge the branches only once for the two.

    Args:
        pair: student and dynamic teacher.

    Returns:
        The student, as `Pair.extract` gives it, and the teacher, as `merged_teacher` gives it.
    """
    with torch.inference_mode(False), torch.no_grad(), parametrize.cached():
        student = pair.extract()
        # The teacher cannot be copied and then freed of its parametrizations: a copy shares the
        # class that a parametrization made, and its removal from one breaks the other.
        teacher = copy_network(student)
        ties = tied_names(teacher)
        widen_module(teacher, pair.plan)
        for name, first in ties.items():
            if name != first:
                owner, _, leaf = name.rpartition(".")
                _tie(teacher, teacher.get_submodule(owner), leaf, first, {})
        for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
            owner, _, leaf = name.rpartition(".")
            tensor.copy_(getattr(pair.teacher.get_submodule(owner), leaf))
    pair.forget()
    return student, teacher
