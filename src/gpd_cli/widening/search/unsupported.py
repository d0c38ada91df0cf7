"""Refuse students that cannot be expanded exactly because of wrappers or the form of their weights.

An expansion copies a module and widens the parameters that its layers compute with. The modules
that are refused here compute with something else. Each error message says what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gpd_cli.errors import ExpansionError
from gpd_cli.widening.layers import is_leaf
from gpd_cli.widening.names import title
from gpd_cli.widening.running.copying import reached

_REMOVERS = {
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove (its zeros are then trained like all weights)",
}

_REGISTRIES = ("_parameters", "_buffers", "_modules")  # in which a copy has its own tensors


def check_student(student: nn.Module) -> None:
    """Check that a student has no module that an expansion cannot widen.

    Args:
        student: the network to expand.

    Raises:
        ExpansionError: when there is such a module; the message gives its name, the cause and the
            remedy.
    """
    parameters = {id(parameter): name for name, parameter in student.named_parameters()}
    for name, module in student.named_modules():
        reason = (
            _wrapped(module)
            or _uninitialized(module)
            or _hidden(module)
            or _table(module)
            or _holding(module, parameters)
        )
        if reason is not None:
            raise ExpansionError(f"{title(name, module)} {reason}.")


def _wrapped(module: nn.Module) -> str | None:
    """The reason to refuse a wrapper (TorchScript, torch.compile, parallel modules), or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is compiled by TorchScript, whose code cannot be widened; pass the module that it was "
            "scripted or traced from"
        )
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return (
            "is compiled by torch.compile for the student's widths; pass the module that was "
            "compiled (its _orig_mod), and set --model.compile true to compile for training"
        )
    parallel = isinstance(module, nn.DataParallel | DistributedDataParallel)
    if parallel or type(module).__name__ == "FullyShardedDataParallel":
        return (
            "spreads a network over devices; pass the network inside it (its .module), and set "
            "--trainer.devices to train on several devices"
        )
    return None


def _uninitialized(module: nn.Module) -> str | None:
    """The reason to refuse a lazy layer that has not seen a batch, or None."""
    own = [*module._parameters.values(), *module._buffers.values()]
    if any(tensor is not None and is_lazy(tensor) for tensor in own):
        return "does not know its width yet; run the student once on a batch first"
    return None


def _hidden(module: nn.Module) -> str | None:
    """The reason to refuse a layer that does not compute with its own parameters, or None."""
    if isinstance(module, nn.RNNBase):
        return (
            "keeps its weights a second time, out of reach of an expansion; build the network "
            "without recurrent layers"
        )
    if parametrize.is_parametrized(module):
        weight = next(iter(module.parametrizations))  # type: ignore[arg-type]
        kinds = [type(kind).__name__ for kind in module.parametrizations[weight]]  # type: ignore
        return (
            f"computes its {weight} by a parametrization of its own ({', '.join(kinds)}), which "
            "student and teacher cannot share; make the result permanent with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    for hook in module._forward_pre_hooks.values():
        for kind, remover in _REMOVERS.items():
            if isinstance(hook, kind):
                return (
                    f"has its weight computed by a hook ({type(hook).__name__}) from tensors that "
                    f"cannot be expanded; make the result permanent with {remover}"
                )
    if is_leaf(module) and isinstance(vars(module).get("weight"), Tensor):
        return (
            "has a weight that is not a parameter but is computed by other code (a hook); make the "
            "result its parameter (torch.nn.Parameter) first"
        )
    return None


def _table(module: nn.Module) -> str | None:
    """The reason to refuse a table with normalized rows or sparse gradients, or None."""
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None
    if module.max_norm is not None:
        return (
            "rescales the rows that it looks up in place, by a norm that changes with the width; "
            "build it without max_norm"
        )
    if module.sparse:
        return (
            "has sparse gradients, which weights that student and teacher share cannot have; build "
            "it with sparse=False"
        )
    return None


def _holding(module: nn.Module, parameters: Mapping[int, str]) -> str | None:
    """The reason to refuse a module with an attribute that leads to a parameter, or None.

    Args:
        module: the module.
        parameters: names of the student's parameters, by their ids.
    """
    for attribute, value in vars(module).items():
        if attribute in _REGISTRIES:
            continue
        name = next((parameters[id(v)] for v in reached(value) if id(v) in parameters), None)
        if name is not None:
            return (
                f"keeps {name} in another attribute as well ({attribute}), where it would not be "
                "the wide one; let the code take it from its module (self.NAME) in each forward"
            )
    return None
