"""Names of recipes: ``recipe:imagenet/distill/resnet18_dkd`` is a file installed with `gpd`."""

from __future__ import annotations

from difflib import SequenceMatcher
from heapq import nlargest
from pathlib import Path

from gpd_cli.errors import RecipeError

PREFIX = "recipe:"
"""Prefix of a recipe's name where the path of a configuration is expected."""

# In the repository, a link to the folder `configs`; in an installed package, a folder of its own.
_FOLDER = Path(__file__).parent / "configs"
_SUFFIX = ".yaml"
_ALIKE = 0.8  # least similarity (ratio of difflib, from 0 to 1) at which a name is suggested


def recipe_names() -> list[str]:
    """The names of all recipes, in alphabetical order: their paths in ``configs`` without suffix.

    Example:
        >>> [name for name in recipe_names() if name.startswith("imagenet/scratch/")]
        ['imagenet/scratch/mobilenetv1', 'imagenet/scratch/resnet18', 'imagenet/scratch/rvt_tiny']
    """
    files = _FOLDER.rglob(f"*{_SUFFIX}")
    return sorted(file.relative_to(_FOLDER).with_suffix("").as_posix() for file in files)


def recipe_path(name: str) -> Path:
    """The path of a recipe's file.

    Args:
        name: the recipe's name, from `recipe_names`, with or without the ending ``.yaml``.

    Raises:
        RecipeError: when there is no such recipe; the message names the most similar ones.
    """
    name = name.removesuffix(_SUFFIX)
    names = recipe_names()
    if name not in names:
        nearest = nlargest(3, names, key=lambda known: _similarity(name, known))
        raise RecipeError(
            f"Unknown recipe '{name}'; the nearest names are {', '.join(nearest)}, and gpd recipes "
            "lists all."
        )
    return _FOLDER / f"{name}{_SUFFIX}"


def configuration_path(path: str) -> str:
    """The path of a configuration, which users may also give as ``recipe:NAME``.

    Args:
        path: path of a file, which is returned unchanged, or ``recipe:NAME``.

    Raises:
        RecipeError: when there is no such recipe.

    Example:
        >>> configuration_path("mine.yaml")
        'mine.yaml'
    """
    if not path.startswith(PREFIX):
        return path
    return str(recipe_path(path.removeprefix(PREFIX)))


def configuration_name(path: str) -> str:
    """The name of a configuration for users: ``recipe:NAME`` for a recipe, else the path itself.

    Args:
        path: path of the configuration's file.

    Example:
        >>> configuration_name(configuration_path("recipe:digits"))
        'recipe:digits'
        >>> configuration_name("mine.yaml")
        'mine.yaml'
    """
    file = Path(path)
    if not file.is_relative_to(_FOLDER):
        return path
    return f"{PREFIX}{file.relative_to(_FOLDER).with_suffix('').as_posix()}"


def recipe_meant(path: str) -> str | None:
    """The recipe that was probably meant by the path of a missing file; None if none is similar.

    Args:
        path: path of a configuration that does not exist.

    Example:
        >>> [recipe_meant(path) for path in ("digits", "configs/digit.yaml", "../cnn.yaml", "my")]
        ['recipe:digits', 'recipe:digits', 'recipe:imagenet/cnn', None]
    """
    # A copied recipe may build on another one by a relative path.
    name = path.removesuffix(_SUFFIX).lstrip("./").removeprefix("configs/")
    names = recipe_names()
    nearest = max(names, key=lambda known: _similarity(name, known))
    return f"{PREFIX}{nearest}" if _similarity(name, nearest) >= _ALIKE else None


def _similarity(name: str, known: str) -> float:
    """Similarity of a name to a recipe's name, from 0 to 1; the recipe's folder may be left out."""
    candidates = (known, known.rpartition("/")[2])
    return max(SequenceMatcher(None, name, candidate).ratio() for candidate in candidates)
