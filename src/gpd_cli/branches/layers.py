"""Choose the layers of a network that get branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from gpd_cli.branches.names import accepted_branches
from gpd_cli.errors import GpdError


def _all(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_modules()}


def _3x3_stride1(network: nn.Module) -> set[str]:
    convolutions = {
        name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
    }
    stem = next(iter(convolutions), None)
    return {
        name
        for name, module in convolutions.items()
        if module.kernel_size == (3, 3) and tuple(module.stride) == (1, 1) and name != stem
    }


LAYER_SETS: dict[str, Callable[[nn.Module], set[str]]] = {
    "all": _all,
    "3x3_stride1": _3x3_stride1,
}
"""Names of sets of layers: all layers, and the layers of the paper (Guo et al., ICLR 2025).

The paper's authors give branches to 3 x 3 convolutions of stride 1, depthwise ones included: 13
layers of ResNet-18 and 9 of MobileNet V1. The stems of these networks are strided and get none. The
stem (first convolution) of a network for small images has stride 1, but gets no branches either.
"""

ALL_LAYERS = ("all",)


def branched_layers(
    network: nn.Module, names: Sequence[str], layers: Sequence[str] = ALL_LAYERS
) -> dict[str, tuple[str, ...]]:
    """The layers that get branches, with the branches that each layer can take.

    Args:
        network: the student.
        names: branches, as `gpd_cli.branches.branch_names` returns them.
        layers: names of `LAYER_SETS`, patterns of layer names (``layer4.*``), or names of modules,
            which stand for all layers inside. The result has the layers of all these entries.

    Returns:
        The names of the branches by layer name, for the layers that get any.

    Raises:
        GpdError: when a pattern or module name matches no layer that can take any of the branches.
    """
    if not names:
        return {}
    accepted = {
        name: found
        for name, module in network.named_modules()
        if (found := accepted_branches(module, names))
    }
    chosen: set[str] = set()
    for entry in layers:
        if entry in LAYER_SETS:
            chosen |= LAYER_SETS[entry](network)
            continue
        named = {n for n in accepted if fnmatchcase(n, entry) or n.startswith(f"{entry}.")}
        if not named:
            example = next(iter(accepted), "layer4.*")
            raise GpdError(
                f"No layer that can have branches is named '{entry}'; set branch_layers to "
                f"{' or '.join(LAYER_SETS)}, or to patterns of layer names, such as '{example}'."
            )
        chosen |= named
    return {name: found for name, found in accepted.items() if name in chosen}


def layers_in_vain(
    network: nn.Module, names: Sequence[str], layers: Sequence[str] = ALL_LAYERS
) -> str | None:
    """Remark on sets of layers that stand for no layer of this network that can take a branch.

    A pattern that matches nothing is an error. A set is not, since recipes name sets for students
    of any kind, and since checkpoints of such networks can be read.

    Args:
        network: the student.
        names: branches, as `gpd_cli.branches.branch_names` returns them.
        layers: which layers get branches, see `branched_layers`.

    Returns:
        A sentence with the remedy; None if there are no branches, or every set has a layer for one.
    """
    if not names:
        return None
    accepted = branched_layers(network, names)
    if not accepted:
        return (
            f"No layer of the student can take a branch ({', '.join(names)}), so that there is "
            "none; choose other --model.branches, or set --model.branches 1."
        )
    sets = [entry for entry in layers if entry in LAYER_SETS]
    if not (empty := [e for e in sets if not accepted.keys() & LAYER_SETS[e](network)]):
        return None
    return (
        f"--model.branch_layers {', '.join(empty)} stands for no layer of the student that can "
        "take a branch; choose others (all, or patterns of layer names, such as "
        f"'{next(iter(accepted))}'), or set --model.branches 1."
    )
