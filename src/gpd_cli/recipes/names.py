"""Recipes by name: ``recipe:imagenet/distill/resnet18_dkd`` is a file that comes with `gpd`."""

from __future__ import annotations

from difflib import SequenceMatcher
from heapq import nlargest
from pathlib import Path

from gpd_cli.errors import RecipeError

PREFIX = "recipe:"
"""What a recipe's name begins with where the path of a configuration is expected."""

# In the repository a link to its folder `configs`; in an installed package a folder of its own.
_FOLDER = Path(__file__).parent / "configs"
_SUFFIX = ".yaml"
_ALIKE = 0.8  # share of letters that a name and the one that is meant have in common, at least


def recipe_names() -> list[str]:
    """The names of all recipes, in alphabetical order: their paths in ``configs``, without ending.

    Example:
        >>> [name for name in recipe_names() if name.startswith("imagenet/scratch/")]
        ['imagenet/scratch/mobilenetv1', 'imagenet/scratch/resnet18', 'imagenet/scratch/rvt_tiny']
    """
    files = _FOLDER.rglob(f"*{_SUFFIX}")
    return sorted(file.relative_to(_FOLDER).with_suffix("").as_posix() for file in files)


def recipe_path(name: str) -> Path:
    """The file of a recipe.

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
            f"Unknown recipe '{name}': the nearest names are {', '.join(nearest)}; `gpd recipes` "
            "lists them all."
        )
    return _FOLDER / f"{name}{_SUFFIX}"


def configuration_path(path: str) -> str:
    """The path of a configuration that may be given as ``recipe:NAME``; other paths as they are.

    Args:
        path: path of a file, or the name of a recipe behind ``recipe:``.

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
    """What users call a configuration: ``recipe:NAME`` for the file of a recipe.

    Args:
        path: path of a file.

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
    """The recipe that was probably meant by the path of a configuration that there is not.

    Args:
        path: path of a file.

    Example:
        >>> [recipe_meant(path) for path in ("digits", "configs/digit.yaml", "resnet18_dkd", "my")]
        ['recipe:digits', 'recipe:digits', 'recipe:imagenet/distill/resnet18_dkd', None]
    """
    name = path.removesuffix(_SUFFIX).removeprefix("configs/")
    names = recipe_names()
    nearest = max(names, key=lambda known: _similarity(name, known))
    return f"{PREFIX}{nearest}" if _similarity(name, nearest) >= _ALIKE else None


def _similarity(name: str, known: str) -> float:
    """Between 0 and 1; the folders of the known name may be missing."""
    candidates = (known, known.rpartition("/")[2])
    return max(SequenceMatcher(None, name, candidate).ratio() for candidate in candidates)
