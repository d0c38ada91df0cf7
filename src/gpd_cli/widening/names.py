"""Qualified names of modules, of their tensors and of their attributes.

The network itself has the empty name, and its own tensors have no dot in theirs.
"""

from __future__ import annotations

from torch import nn


def qualified(owner: str, name: str) -> str:
    """Join a module's name and the local name of something in the module.

    Example:
        >>> qualified("blocks.0", "scale"), qualified("", "scale")
        ('blocks.0.scale', 'scale')
    """
    return f"{owner}.{name}" if owner else name


def split_name(name: str) -> tuple[str, str]:
    """Split a qualified name into the name of the module and the local name in the module.

    Example:
        >>> split_name("blocks.0.scale"), split_name("scale")
        (('blocks.0', 'scale'), ('', 'scale'))
    """
    owner, _, local = name.rpartition(".")
    return owner, local


def is_inside(name: str, module: str) -> bool:
    """Whether something is inside a module, by their names; a module is not inside itself.

    Example:
        >>> is_inside("blocks.10", "blocks.1"), is_inside("blocks.1.norm", "blocks.1")
        (False, True)
    """
    return name.startswith(f"{module}.") if module else bool(name)


def local_name(name: str, module: str) -> str:
    """The name of something inside a module, relative to the module.

    Example:
        >>> local_name("blocks.0.attn.scale", "blocks.0")
        'attn.scale'
    """
    return name.removeprefix(f"{module}.") if module else name


def title(name: str, module: nn.Module) -> str:
    """Name and class of a module, for messages.

    Example:
        >>> title("", nn.Identity()), title("head", nn.Linear(1, 1))
        ('the network (Identity)', 'head (Linear)')
    """
    return f"{name or 'the network'} ({type(module).__name__})"
