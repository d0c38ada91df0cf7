"""Errors that users can fix: each message is one sentence that names the cause and the remedy."""

from collections.abc import Sequence


class GpdError(Exception):
    """Base of every error that `gpd` reports in one sentence, without a traceback."""


class ExpansionError(GpdError):
    """A student cannot be expanded exactly; the message names the module and the remedy."""


class ModelError(GpdError):
    """A model name or its arguments are unknown or do not fit together."""


class StudentArgumentsError(ModelError):
    """A student cannot be built with its arguments."""


class WeightsError(GpdError):
    """A weight file or checkpoint is missing, unreadable or does not fit the model."""


class DataError(GpdError):
    """A data set is missing, empty or does not fit the model."""


class TrainingError(GpdError):
    """Training cannot start or go on, for example because its settings contradict each other."""


class DivergenceError(TrainingError):
    """The loss, gradients or weights are NaN or infinite, and training cannot mend them."""


class MethodError(GpdError):
    """A distillation method is unknown, or does not suit its networks, settings or labels."""


class RecipeError(GpdError):
    """A recipe is unknown; the message names the most similar ones."""


class ConfigurationError(GpdError):
    """A configuration is missing or cannot be read; the message names the file, and the line."""


def did_you_mean(*names: str | None) -> str:
    """The end of a message about an unknown name: which names were probably meant.

    Args:
        names: the names that resemble it, if any; None stands for no name.

    Example:
        >>> did_you_mean("adamw", "adam"), did_you_mean(None)
        (' (did you mean adamw or adam?)', '')
    """
    known = [name for name in names if name is not None]
    return f" (did you mean {' or '.join(known)}?)" if known else ""


def no_effect(group: str, names: Sequence[str]) -> str:
    """The beginning of a remark on options that were given in vain.

    Args:
        group: the group of the options, such as ``data``.
        names: the names of the options within the group, one or more.

    Example:
        >>> no_effect("data", ["hflip"]), no_effect("data", ["hflip", "re_prob"])
        ('--data.hflip has no effect', '--data.hflip, --data.re_prob have no effect')
    """
    options = ", ".join(f"--{group}.{name}" for name in names)
    return f"{options} {'has' if len(names) == 1 else 'have'} no effect"


def reason_of(error: BaseException) -> str:
    """The message of a library's error, shortened to 300 characters, as a part of a sentence."""
    return " ".join(str(error).split())[:300].rstrip(".!") or type(error).__name__


def short_text(error: BaseException) -> str:
    """The class of an exception and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
