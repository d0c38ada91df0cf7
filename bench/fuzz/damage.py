"""Random damage to bytes, to nested values and to text; each damage comes with a description."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NUMBERS = (-1, 0, 1, 2, 7, 10**6, 10**9, 10**18, -(10**9), 0.5, float("nan"), float("inf"))
_OTHERS: tuple[Any, ...] = (None, "", "text", [], {}, [1], {"a": 1}, True, [[[]]], ["a", None])
_WORDS = (
    *("null", "[]", "{}", "-1", "0", "1e9", ".nan", ".inf", "true", "''", "text", "[1, 2]"),
    *(
        "{a: b}",
        "*x",
        "&x 1",
        "!!python/object/apply:os.system ['true']",
        "- 1",
        "? a",
        "10000000000",
    ),
    *(
        "'",
        '"',
        "%",
        "@",
        "\t",
        "\x00",
        "\ufeff",
        "---",
        "...",
        "|",
        ">",
        "é",
        "1:30",
        "0x10",
        "1_000",
    ),
)


class Payload:
    """An object that creates a folder when it is unpickled, to show that code of a file was run.

    Args:
        sign: path of the folder.
    """

    def __init__(self, sign: str) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        """The function that unpickling calls, and its arguments."""
        return os.mkdir, (self.sign,)


def damaged_bytes(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change, remove or add some bytes.

    Args:
        draw: random generator.
        content: the bytes to damage.

    Returns:
        The damaged bytes, and a description of the damage.
    """
    place = draw.randrange(len(content))
    length = min(draw.choice((1, 16, 512, 4096)), len(content) - place)
    how = draw.choice(("bit", "bit", "noise", "zeros", "cut", "cut out", "twice", "empty", "tail"))
    before, after = content[:place], content[place + length :]
    if how == "bit":
        found = bytearray(content)
        found[place] ^= 1 << draw.randrange(8)
        return bytes(found), f"bit of byte {place} flipped"
    if how == "noise":
        return before + draw.randbytes(length) + after, f"{length} bytes of noise at {place}"
    if how == "zeros":
        return before + bytes(length) + after, f"{length} zeros at {place}"
    if how == "cut":
        return before, f"cut off at {place}"
    if how == "cut out":
        return before + after, f"{length} bytes missing at {place}"
    if how == "twice":
        return content[: place + length] + content[place:], f"{length} bytes twice at {place}"
    if how == "tail":
        return content + draw.randbytes(length), f"{length} bytes of noise behind the end"
    return b"", "empty"


def damaged_value(draw: random.Random, value: Any, sign: str) -> tuple[Any, str, bool]:
    """Remove or replace one entry of a nested value.

    Args:
        draw: random generator.
        value: a nested value of mappings, lists, tensors and plain values, which is not changed.
        sign: path for `Payload`.

    Returns:
        The damaged value, a description of the damage, and whether the damage may go unnoticed;
        this is so if only a number, or the values of a tensor, were replaced by others of the same
        kind.
    """
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        if draw.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}, f"/{key} lost", False
        new, how, fine = damaged_value(draw, value[key], sign)
        found = dict(value)
        found[key] = new
        return found, f"/{key}{how}", fine
    if isinstance(value, list | tuple) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        new, how, fine = damaged_value(draw, value[place], sign)
        entries = [*value[:place], new, *value[place + 1 :]]
        return type(value)(entries), f"/{place}{how}", fine
    if isinstance(value, Tensor) and draw.random() < 0.8:
        return _damaged_tensor(draw, value)
    if draw.random() < 0.05:
        return Payload(sign), ": code", False
    new = draw.choice(_NUMBERS if draw.random() < 0.6 else _OTHERS)
    fine = isinstance(value, int | float) and isinstance(new, int | float)
    return new, f": {value!r:.40} -> {new!r}", fine


def _damaged_tensor(draw: random.Random, value: Tensor) -> tuple[Any, str, bool]:
    how = draw.choice(
        ("nan", "inf", "shape", "empty", "complex", "whole", "scalar", "huge", "other")
    )
    if how in ("nan", "inf") and value.is_floating_point() and value.numel():
        found = value.clone()
        found.view(-1)[draw.randrange(found.numel())] = float(how)
        return found, f": {how} in it", False
    if how == "shape":
        return torch.zeros(*value.shape, 2), ": another shape", False
    if how == "empty":
        return value.new_zeros(0), ": empty", False
    if how == "complex":
        return value.to(torch.complex64), ": complex", False
    if how == "whole" and value.is_floating_point():
        return value.to(torch.int32), ": whole numbers", False
    if how == "scalar" and value.ndim:
        return value.new_zeros(()), ": a scalar", False
    if how == "huge":  # a view of one number
        return value.new_zeros(()).expand(10**6, 10**5), ": ten to the 11 elements", False
    found = value.clone()
    return (found * 2 if value.is_floating_point() else found + 1), ": other values", True


def damaged_text(draw: random.Random, text: str) -> tuple[str, str]:
    """Remove lines of a configuration, replace words, or write YAML that exceeds limits.

    Args:
        draw: random generator.
        text: text of the configuration.

    Returns:
        The damaged text, and a description of the damage.
    """
    lines = text.splitlines()
    place = draw.randrange(len(lines))
    line = lines[place]
    key, colon, value = line.partition(":")
    how = draw.choice(
        ("value", "value", "value", "key", "lost", "indent", "bytes", "limit", "twice")
    )
    if how == "value" and colon:
        word = draw.choice(_WORDS)
        lines[place] = f"{key}: {word}"
        return "\n".join(lines), f"{line.strip()!r:.60} -> {word!r}"
    if how == "key" and colon:
        word = draw.choice((*_WORDS, key.strip() + "s", "batch_size", "class_path"))
        lines[place] = f"{key[: len(key) - len(key.lstrip())]}{word}:{value}"
        return "\n".join(lines), f"key {key.strip()!r} -> {word!r}"
    if how == "lost":
        return "\n".join(lines[:place] + lines[place + 1 :]), f"{line.strip()!r:.60} lost"
    if how == "indent":
        lines[place] = " " * draw.randrange(9) + line.strip()
        return "\n".join(lines), f"{line.strip()!r:.60} at another place"
    if how == "twice":
        return "\n".join([*lines[:place], line, *lines[place:]]), f"{line.strip()!r:.60} twice"
    if how == "limit":
        return _limits(draw, text)
    content, how = damaged_bytes(draw, text.encode())
    return content.decode("utf-8", "surrogateescape"), how


def _limits(draw: random.Random, text: str) -> tuple[str, str]:
    """Text that is valid YAML but too much for a program without limits, such as alias bombs."""
    how = draw.choice(("aliases", "brackets", "braces", "indents", "itself", "long", "digits"))
    if how == "aliases":
        bomb = "\n".join(
            f"x{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 10)}]" if k else "x0: &x0 [a]"
            for k in range(9)
        )
        return f"{bomb}\nmodel: *x8\n", "a bomb of aliases"
    if how == "brackets":
        return f"model: {'[' * 20_000}{']' * 20_000}\n", "20,000 brackets"
    if how == "braces":
        return f"model: {'{a: ' * 20_000}1{'}' * 20_000}\n", "20,000 braces"
    if how == "indents":
        return "\n".join(" " * k + "a:" for k in range(2000)), "2,000 levels"
    if how == "itself":
        return "model: &m\n  student_args: *m\n", "an alias to what it is in"
    if how == "digits":
        return f"{text}\nseed_everything: {'9' * 5000}\n", "a number of 5,000 digits"
    return f"{text}\nmodel.student: {'a' * 10**6}\n", "a name of a million letters"
