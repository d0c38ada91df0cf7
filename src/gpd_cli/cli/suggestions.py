"""Suggestions of the option that a user probably meant by typing one that does not exist."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from jsonargparse import ArgumentParser

from gpd_cli.cli.configurations import place_of
from gpd_cli.data import ImageData
from gpd_cli.errors import ConfigurationError, did_you_mean

# For the last parts of options of other programs (timm, torchvision's references, ultralytics):
# the options of gpd that do the same.
_ELSEWHERE = {
    "epochs": "--trainer.max_epochs",
    "gpus": "--trainer.devices",
    "amp": "--trainer.precision",
    "clip_grad": "--trainer.gradient_clip_val",
    "output": "--trainer.default_root_dir",
    "output_dir": "--trainer.default_root_dir",
    "learning_rate": "--model.optimizer.lr",
    "optimizer": "--model.optimizer.opt",
    "wd": "--model.optimizer.weight_decay",
    "scheduler": "--model.optimizer.sched",
    "arch": "--model.student",
    "weights": "--model.student_weights",
    "pretrained": "--model.student_args '{pretrained: true}'",
    "teacher": "--model.static_teacher.name",
    "bs": "--data.batch_size",
    "batch": "--data.batch_size",
    "workers": "--data.num_workers",
    "data_dir": "--data.root",
    "data_path": "--data.root",
    "img_size": "--data.image_size",
    "imgsz": "--data.image_size",
    "resume": "--ckpt_path",
    "checkpoint": "--ckpt_path",
}
_UNKNOWN = re.compile(r"[Uu]nrecognized arguments: (\S+)")
_UNKNOWN_IN_FILE = re.compile(
    r"(?:Subcommand '\w+' does not accept o|Group '(?P<group>[\w.]+)' does not accept o|O)"
    r"ption '(?P<name>[^']+)'"
)
_ALIKE = 0.75  # least similarity of two names (ratio of difflib, from 0 to 1) for a suggestion
_LONG = 6  # least length, in letters, of a last part that is compared with other last parts


def suggesting(
    error: ArgumentError,
    parser: ArgumentParser,
    arguments: Sequence[str],
    others: Iterable[str] = (),
) -> ArgumentError | ConfigurationError:
    """Add the option that was probably meant to a parser's error about an unknown option.

    Args:
        error: the error that the parser raised.
        parser: parser of the command.
        arguments: the command line.
        others: further options of the command, which the parser knows only as arguments of a class.

    Returns:
        The error to raise instead. If the unknown option stands in a configuration, the error names
        the configuration.
    """
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    known.sort(key=lambda name: name.startswith("--trainer."))  # Lightning's options come last
    options = [*known, *others]
    if (found := _UNKNOWN_IN_FILE.match(str(error))) is None:
        return ArgumentError(None, with_suggestion(str(error), options))
    option = ".".join(filter(None, (found["group"], found["name"])))
    place, meant = place_of(option, arguments), nearest(f"--{option}", options)
    hint = did_you_mean(meant and meant.lstrip("-"))
    where = "" if place is None else f"{place}: "
    return ConfigurationError(f"{where}there is no option {option}{hint}.")


def data_options() -> list[str]:
    """The options that set the arguments of `ImageData`, such as ``--data.batch_size``."""
    return [f"--data.{name}" for name in inspect.signature(ImageData).parameters]


def with_suggestion(message: str, known: Iterable[str]) -> str:
    """Add the option that was probably meant to a parser's error message.

    Args:
        message: the parser's message; if it is about anything else, it is returned unchanged.
        known: names of the command's options, with their hyphens.

    Example:
        >>> with_suggestion("unrecognized arguments: --lr 0.1", ["--model.optimizer.lr"])
        'unrecognized arguments: --lr 0.1 (did you mean --model.optimizer.lr?)'
    """
    found = _UNKNOWN.search(message)
    if found is None:
        return message
    typed = found[1]
    if not typed.startswith("-"):
        if typed.endswith((".yaml", ".yml")) or typed.startswith("recipe:"):
            return f"{message} (a configuration is given as -c {typed})"
        if typed.endswith(".ckpt"):
            return f"{message} (a checkpoint is given as --ckpt_path {typed})"
    return message + did_you_mean(nearest(typed.partition("=")[0], known))


def nearest(typed: str, known: Iterable[str]) -> str | None:
    """Find the option that was probably meant; None if no option resembles what was typed.

    Args:
        typed: the option as it was typed, with leading hyphens; hyphens within the name are taken
            as underscores.
        known: names of the options that exist, with their hyphens.

    Example:
        >>> options = ["--model.ratio", "--data.ratio", "--data.batch_size", "--trainer.max_epochs"]
        >>> [nearest(typed, options) for typed in ("--batch-size", "--epochs", "--model.ratoi")]
        ['--data.batch_size', '--trainer.max_epochs', '--model.ratio']
    """
    options = list(known)
    name = typed.lstrip("-").replace("-", "_").lower()
    if not typed.startswith("--") or not name:
        return None
    leaf = name.rpartition(".")[2]
    elsewhere = _ELSEWHERE.get(leaf, "")
    if elsewhere.partition(" ")[0] in options:
        return elsewhere
    same = [option for option in options if _leaf(option) == leaf]
    if same and "." not in name:
        return same[0]
    begun = [option for option in options if option.startswith(f"--{name}")]
    if len(begun) == 1:
        return begun[0]
    close = get_close_matches(f"--{name}", options, n=1, cutoff=_ALIKE)
    if close:
        return close[0]
    if len(leaf) < _LONG:
        return None
    leaves = get_close_matches(leaf, [_leaf(option) for option in options], n=1, cutoff=_ALIKE)
    return next((option for option in options if [_leaf(option)] == leaves), None)


def _leaf(option: str) -> str:
    return option.lstrip("-").rpartition(".")[2]
