"""Reading of the configurations that a command line names, before the command line is parsed.

So errors can name the configuration, values such as the checkpoint are known early, and the parser
gets each configuration in one form: its bases before it, and its settings in groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import get_loader, set_loader
from yaml import MarkedYAMLError, YAMLError, safe_load
from yaml.reader import ReaderError

from gpd_cli.cli.arguments import (
    CHECKPOINT,
    CONFIGURATION_OPTIONS,
    is_inline,
    occurrences,
    with_configurations,
)
from gpd_cli.cli.old_forms import current_settings
from gpd_cli.cli.setting_groups import GROUPS, in_groups, inline
from gpd_cli.cli.yaml_limits import check_limits
from gpd_cli.errors import ConfigurationError, did_you_mean
from gpd_cli.recipes.names import configuration_name, configuration_path, recipe_meant

YAML = "gpd"
"""Name of the YAML loader of all parsers, which limits what a text may expand to."""
_WEIGHTS = ("model.student_weights",)
_IMAGE_SIZE = ("data.image_size", "data.init_args.image_size")
_BASE = "config"  # the entry by which a configuration names the configuration that it builds on


def load_yaml(text: str) -> Any:
    """Load the value of an option, or a text that `expanded` has written.

    Args:
        text: text in YAML.

    Raises:
        YAMLError: when the text is not valid YAML, or exceeds the limits of `yaml_limits`.
    """
    check_limits(text)
    return get_loader("yaml")(text)


set_loader(YAML, load_yaml, (YAMLError,))


def load_configuration(text: str) -> Any:
    """Load the content of a configuration.

    Args:
        text: text in YAML.

    Returns:
        The content, with old forms of settings translated to their present form, and its settings
        in groups, see `in_groups`; unchanged if the text is not that of a configuration.

    Raises:
        YAMLError: when the text is not valid YAML, exceeds the limits of `yaml_limits`, or sets an
            option twice.
        MethodError: when a setting has an old form without an equivalent.
    """
    content = load_yaml(text)
    if not isinstance(content, dict):
        return content
    if isinstance(base := content.get(_BASE), str):
        content[_BASE] = configuration_path(base)
    return in_groups(current_settings(content))


def with_pipes_read(arguments: Sequence[str]) -> list[str]:
    """Replace configurations that come through a pipe (``-c <(command)``) by their content.

    A pipe can be read only once, but configurations are read several times.

    Args:
        arguments: the command line.

    Returns:
        The command line without pipes.

    Raises:
        ConfigurationError: when the content is no configuration.
    """

    def read(value: str) -> list[str]:
        if not value or is_inline(value) or not _is_pipe(Path(value)):
            return [value]
        return [inline(_read(value, Path(value)))]

    return with_configurations(arguments, read)


def expanded(arguments: Sequence[str]) -> list[str]:
    """Replace each configuration of a command line by its bases and itself, as inline texts.

    The parser then merges them setting by setting, as it does with several ``-c``. By itself it
    would replace a whole group of a base by the group of the same name.

    Args:
        arguments: the command line; its configurations have been checked to be readable.

    Returns:
        The command line for the parser. A configuration that cannot be read is left as it is, so
        that the parser reports what is wrong.
    """

    def parts(value: str) -> list[str]:
        contents = [content for _, content in _contents_of(value, inline=True)]
        own = [{key: v for key, v in content.items() if key != _BASE} for content in contents]
        return [inline(settings) for settings in own if settings] if contents else [value]

    return with_configurations(arguments, parts)


def check_configurations(arguments: Sequence[str]) -> None:
    """Check that all configurations of a command line, and their bases, can be read.

    Args:
        arguments: the command line, in which recipes have been replaced by the paths of their
            files.

    Raises:
        ConfigurationError: when a configuration is missing, empty or not valid YAML.
    """
    for _ in _contents(arguments):
        pass


def configuration_files(arguments: Sequence[str]) -> list[str]:
    """The paths of all configurations of a command line, and of their bases.

    Args:
        arguments: the command line; its configurations have been checked to be readable.

    Returns:
        The paths, without configurations that are written on the command line itself.
    """
    return [path for path, _ in _contents(arguments)]


def place_of(option: str, arguments: Sequence[str]) -> str | None:
    """Find the configuration that sets an option; if there are several, the last of them.

    Args:
        option: name of the option with dots, such as ``model.ratio`` or ``data.init_args.root``.
        arguments: the command line; its configurations have been checked to be readable.

    Returns:
        The path of the configuration, or ``recipe:NAME``; None if no configuration sets the option.
    """
    found = None
    for path, content in _contents(arguments):
        if _has(content, option):
            found = configuration_name(path)
    return found


def chosen_image_size(arguments: Sequence[str]) -> int | None:
    """The image size that is set by the command line, or else by the last configuration with one.

    Args:
        arguments: the command line; its configurations have been checked to be readable.

    Returns:
        Height and width of the square images in pixels; None if nothing sets the size.
    """
    found = _chosen(arguments, _IMAGE_SIZE)
    if isinstance(found, str) and found.isdecimal():
        found = int(found)
    return found if isinstance(found, int) else None  # the parser later refuses other values


def chosen_checkpoint(arguments: Sequence[str]) -> str | None:
    """The checkpoint that a command line or its configurations name; the last one if several do.

    A configuration whose ``ckpt_path`` is null, as in configurations of runs, does not cancel a
    checkpoint that was named earlier.

    Args:
        arguments: the command line; its configurations have been checked to be readable.
    """
    found: str | None = None
    for name, value in occurrences(arguments, (CHECKPOINT, *CONFIGURATION_OPTIONS)):
        if name == CHECKPOINT:
            found = None if value in ("", "null") else value
        else:
            for _, content in _contents_of(value, inline=True):
                named = content.get(CHECKPOINT.removeprefix("--"))
                found = named if isinstance(named, str) and named else found
    return found


def chosen_weights(arguments: Sequence[str]) -> str | None:
    """The file of the student's weights that a command line or its last configuration names.

    Args:
        arguments: the command line; its configurations have been checked to be readable.
    """
    found = _chosen(arguments, _WEIGHTS)
    return found if isinstance(found, str) else None


def _chosen(arguments: Sequence[str], names: Sequence[str]) -> Any:
    """The value of an option on the command line, or else in its last configuration with a value.

    Args:
        arguments: the command line; its configurations have been checked to be readable.
        names: names of the option, with dots.

    Returns:
        The value, which is text if it is from the command line; None without any.
    """
    found: Any = None
    for _, content in _contents(arguments, inline=True):
        for name in names:
            found = _value(content, name, found)
    groups = tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))
    for option, value in occurrences(arguments, [f"--{name}" for name in (*names, *groups)]):
        group = option.removeprefix("--")
        if group not in groups:
            found = value
            continue
        with suppress(YAMLError):  # a group of options, as in --data '{image_size: 64}'
            content = in_groups(current_settings({group: load_yaml(value)}))
            for name in names:
                found = _value(content, name, found)
    return found


def _value(content: Any, name: str, default: Any) -> Any:
    """A setting of a configuration by its name with dots, or a default if it is not set."""
    if not isinstance(content, Mapping):
        return default
    if name in content:
        return content[name]
    first, _, rest = name.partition(".")
    return _value(content.get(first), rest, default) if rest else default


def configured_value(path: str, key: str) -> Any:
    """An entry of a configuration file; None if there is no such entry, or no readable file."""
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
        check_limits(text)
        content = safe_load(text)
    except (OSError, ValueError, YAMLError):
        return None  # the parser reports the error later
    return content.get(key) if isinstance(content, dict) else None


def _contents(arguments: Sequence[str], inline: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield path and content of each configuration, so that later ones override earlier ones.

    Args:
        arguments: the command line.
        inline: whether to include configurations written as YAML on the command line itself.
    """
    for _, value in occurrences(arguments, CONFIGURATION_OPTIONS):
        yield from _contents_of(value, inline)


def _contents_of(value: str, inline: bool) -> Iterator[tuple[str, Any]]:
    """Yield what `_contents` does, for the value of a single ``-c``."""
    if is_inline(value):
        yield from _inline_contents(value) if inline else ()
    elif value and not value.startswith("-"):
        yield from _with_bases(value, value, ())


def _inline_contents(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the bases of a configuration written on the command line, then the configuration."""
    content = None
    with suppress(YAMLError):  # the parser reports the error later
        content = load_configuration(text)
    if isinstance(content, dict):
        if isinstance(base := content.get(_BASE), str):
            yield from _with_bases(base, base, ())
        yield text, content


def _with_bases(name: str, path: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the bases of a configuration file, then the configuration itself.

    Args:
        name: the configuration as the user or another configuration names it.
        path: path of the configuration's file.
        above: paths of the configurations that build on this one, the outermost first.
    """
    file = Path(path)
    if not _is_there(file):
        raise ConfigurationError(_missing(name, file, above))
    if not file.is_file():  # such as /dev/null, which is left to the parser
        if above:
            raise ConfigurationError(f"'{name}', on which {above[-1].name} builds, is not a file.")
        return
    content = _read(path, file)
    if isinstance(base := content.get(_BASE), str):
        if file.resolve() in above:
            raise ConfigurationError(f"{path} builds on itself; remove its entry '{_BASE}'.")
        # jsonargparse, too, takes the path of a base as relative to the file that names the base.
        yield from _with_bases(base, str(file.parent / base), (*above, file.resolve()))
    yield path, content


def _read(path: str, file: Path) -> dict[str, Any]:
    """Read the content of a configuration file.

    Raises:
        ConfigurationError: when the file cannot be read, is empty, or is not a configuration.
    """
    name = configuration_name(path)
    try:
        content = load_configuration(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigurationError(f"{name}{line}: {error.problem}.") from error
    except ReaderError as error:
        raise ConfigurationError(f"{name}: {error.reason}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{name} is not text in UTF-8; save the configuration as UTF-8."
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{name} cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    except (ValueError, YAMLError) as error:
        raise ConfigurationError(f"{name}: {str(error).rstrip('.')}.") from error
    if content is None:
        raise ConfigurationError(
            f"{name} is empty; gpd recipes NAME prints a configuration as an example."
        )
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{name} contains no options; write them as in 'model: {{student: resnet18}}'."
        )
    for group in GROUPS:
        if isinstance(value := content.get(group, {}), list):
            raise ConfigurationError(f"{name}: {group} takes options with values, not {value}.")
    if not isinstance(base := content.get(_BASE), str | None):
        raise ConfigurationError(
            f"{name}: {_BASE} takes the path or name of a configuration, not {base}."
        )
    return content


def _missing(name: str, file: Path, above: Sequence[Path]) -> str:
    """The error message about a configuration that does not exist.

    Args:
        name: the configuration as it was named.
        file: path of the configuration's file.
        above: paths of the configurations that build on this one.
    """
    what = f"There is no configuration '{name}'"
    with suppress(OSError):  # such as a name that is too long
        what = f"'{name}' is a folder, not a configuration" if file.is_dir() else what
    if above:
        what += f", on which {above[-1].name} builds"
    if (meant := recipe_meant(name)) is not None:
        return f"{what}{did_you_mean(meant)}."
    return f"{what}; gpd recipes lists those of the package."


def _is_pipe(file: Path) -> bool:
    try:
        return file.is_fifo()
    except OSError:  # such as a name that is too long
        return False


def _is_there(file: Path) -> bool:
    try:
        return file.exists() and not file.is_dir()
    except OSError:
        return False


def _has(content: Any, option: str) -> bool:
    if not isinstance(content, Mapping):
        return False
    return any(
        option == str(key)
        or str(key).startswith(f"{option}.")
        or (option.startswith(f"{key}.") and _has(value, option.removeprefix(f"{key}.")))
        for key, value in content.items()
    )
