"""Configurations of a command line: they are read before it is parsed, and named in errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import get_loader, set_loader
from yaml import MarkedYAMLError, YAMLError
from yaml.reader import ReaderError

from gpd_cli.cli.arguments import CHECKPOINT, CONFIGURATION, is_inline, occurrences
from gpd_cli.cli.old_forms import current_settings
from gpd_cli.cli.yaml_limits import check_limits
from gpd_cli.errors import ConfigurationError, did_you_mean
from gpd_cli.recipes.names import configuration_name, configuration_path, recipe_meant

YAML = "gpd"
"""How all parsers read YAML: with settings in their old form as well."""
_GROUPS = ("model", "data", "trainer")
_IMAGE_SIZE = "--data.image_size"
_BASE = "config"  # the entry with the configuration that one builds on


def load_yaml(text: str) -> Any:
    """The content of a configuration, or the value of an option.

    Args:
        text: YAML.

    Raises:
        YAMLError: when it is no YAML, or beyond its limits.
        MethodError: when a setting has an old form without an equivalent.
    """
    check_limits(text)
    content = get_loader("yaml")(text)
    if isinstance(content, dict):
        # What a group has may have been commented out.
        content = {k: v for k, v in content.items() if v is not None or k not in _GROUPS}
        if isinstance(base := content.get(_BASE), str):
            content[_BASE] = configuration_path(base)
    return current_settings(content)


set_loader(YAML, load_yaml, (YAMLError,))


def check_configurations(arguments: Sequence[str]) -> None:
    """Read all configurations of a command line, and those that they build on.

    Args:
        arguments: the command line, in which recipes have been replaced by their files.

    Raises:
        ConfigurationError: when one is missing, empty or no YAML.
    """
    for _ in _contents(arguments):
        pass


def place_of(option: str, arguments: Sequence[str]) -> str | None:
    """The configuration that has an option, the last one if there are several.

    Args:
        option: with dots, such as ``model.ratio`` or ``data.init_args.root``.
        arguments: the command line, whose configurations can be read.

    Returns:
        Its path, or ``recipe:NAME``; None where no configuration has the option.
    """
    found = None
    for path, content in _contents(arguments):
        if _has(content, option):
            found = configuration_name(path)
    return found


def chosen_image_size(arguments: Sequence[str]) -> int | None:
    """The image size that a command line names, or else the last of its configurations that does.

    Args:
        arguments: the command line, whose configurations can be read.

    Returns:
        Height and width in pixels; None where nothing names them.
    """
    found: Any = None
    for _, content in _contents(arguments, inline=True):
        if isinstance(data := content.get("data"), dict):
            settings = data.get("init_args") if "class_path" in data else data
            found = (settings or {}).get("image_size", found)
    for _, value in occurrences(arguments, (_IMAGE_SIZE,)):
        found = int(value) if value.isdecimal() else None  # the parser refuses what is no number
    return found if isinstance(found, int) else None


def chosen_checkpoint(arguments: Sequence[str]) -> str | None:
    """The checkpoint that a command line names, the last one if there are several.

    A configuration without checkpoint (null, in configurations of runs) does not undo an earlier
    one.

    Args:
        arguments: the command line, whose configurations can be read.
    """
    found: str | None = None
    for name, value in occurrences(arguments, (CHECKPOINT, *CONFIGURATION)):
        if name == CHECKPOINT:
            found = None if value in ("", "null") else value
        else:
            for _, content in _contents([name, value], inline=True):
                found = content.get(CHECKPOINT.removeprefix("--")) or found
    return found


def _contents(arguments: Sequence[str], inline: bool = False) -> Iterator[tuple[str, Any]]:
    """Path and content of each configuration, in the order in which later ones have the say.

    Args:
        arguments: the command line.
        inline: whether to read configurations that stand on the command line, too.
    """
    for _, value in occurrences(arguments, CONFIGURATION):
        if is_inline(value):
            yield from _of_text(value) if inline else ()
        elif value and not value.startswith("-"):
            yield from _with_bases(value, value, ())


def _of_text(text: str) -> Iterator[tuple[str, Any]]:
    """A configuration that stands on the command line, after those that it builds on."""
    content = None
    with suppress(YAMLError):  # the parser reports the error later
        content = load_yaml(text)
    if isinstance(content, dict):
        if isinstance(base := content.get(_BASE), str):
            yield from _with_bases(base, base, ())
        yield text, content


def _with_bases(name: str, path: str, above: tuple[Path, ...]) -> Iterator[tuple[str, Any]]:
    """A configuration after those that it builds on.

    Args:
        name: as it is written.
        path: path of its file.
        above: the files that build on it.
    """
    file = Path(path)
    if not _is_there(file):
        raise ConfigurationError(_missing(name, file, above))
    if not file.is_file():  # a pipe, which can be read but once
        return
    content = _read(path, file)
    if isinstance(base := content.get(_BASE), str):
        if file.resolve() in above:
            raise ConfigurationError(f"{path} builds on itself; take its entry '{_BASE}' out.")
        # jsonargparse takes the path of a base as relative to the file that has it.
        yield from _with_bases(base, str(file.parent / base), (*above, file.resolve()))
    yield path, content


def _read(path: str, file: Path) -> dict[str, Any]:
    """The content of a configuration.

    Raises:
        ConfigurationError: when there is none, or it cannot be read.
    """
    name = configuration_name(path)
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigurationError(f"{name}{line}: {error.problem}.") from error
    except ReaderError as error:
        raise ConfigurationError(f"{name}: {error.reason}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name} is no text in UTF-8, as a configuration is.") from error
    except OSError as error:
        raise ConfigurationError(f"{name} cannot be read: {error.strerror}.") from error
    except (ValueError, YAMLError) as error:
        raise ConfigurationError(f"{name}: {str(error).rstrip('.')}.") from error
    if content is None:
        raise ConfigurationError(f"{name} is empty; gpd recipes NAME prints one that is not.")
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{name} holds no options, which are written as in 'model: {{student: resnet18}}'."
        )
    for group in _GROUPS:
        if isinstance(value := content.get(group, {}), list):
            raise ConfigurationError(f"{name}: {group} takes options with values, not {value}.")
    if not isinstance(base := content.get(_BASE), str | None):
        raise ConfigurationError(
            f"{name}: {_BASE} takes the configuration to build on, not {base}."
        )
    return content


def _missing(name: str, file: Path, above: Sequence[Path]) -> str:
    """What to say of a configuration that there is not."""
    what = f"There is no configuration '{name}'"
    with suppress(OSError):  # such as a name that is too long
        what = f"'{name}' is a folder, no configuration" if file.is_dir() else what
    if above:
        what += f", on which {above[-1].name} builds"
    if (meant := recipe_meant(name)) is not None:
        return f"{what}{did_you_mean(meant)}."
    return f"{what}; gpd recipes lists those of the package."


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
        or (option.startswith(f"{key}.") and _has(value, option.removeprefix(f"{key}.")))
        for key, value in content.items()
    )
