"""README and the pages of docs/, the blocks of code in them, and the comments of recipes."""

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_COMMAND = re.compile(r"^# {3}(?=\S)(.*(?:(?<=\\)\n#.*)*)$", re.MULTILINE)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        page: path of its page, from the repository's root.
        language: what the fence says, or nothing.
        text: the code.
    """

    page: str
    language: str
    text: str


def blocks(*languages: str, page: str | None = None) -> list[Block]:
    """The blocks of all pages or of one, in order, in all languages or in some."""
    return [
        Block(name, language, text)
        for path in PAGES
        if page in (None, name := path.relative_to(ROOT).as_posix())
        for language, text in _BLOCK.findall(path.read_text())
        if not languages or language in languages
    ]


def python_file(page: str, name: str, having: str) -> str:
    """The one Python block of a page that begins with a file's name and has some text."""
    found = [block.text for block in blocks("python", page=page)]
    (text,) = [text for text in found if text.startswith(f"# {name}\n") and having in text]
    return text


def recipe_comments() -> list[Block]:
    """The comments at the top of recipes, whose commands are set in by two spaces, as blocks."""
    return [
        Block(path.relative_to(ROOT).as_posix(), "sh", "\n".join(found))
        for path in sorted((ROOT / "configs").rglob("*.yaml"))
        if (found := _COMMAND.findall(path.read_text()))
    ]


def commands(page: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """The commands of ``gpd`` in shell blocks, and behind a ``$``: page and arguments of each."""
    yield from _commands(blocks("", "sh", page=page))


def recipe_commands() -> Iterator[tuple[str, list[str]]]:
    """The commands in the comments of recipes: path of the recipe and arguments of each."""
    for path, arguments in _commands(recipe_comments()):
        yield path, ["4" if word == "N" else word for word in arguments]


def _commands(found: Iterable[Block]) -> Iterator[tuple[str, list[str]]]:
    for block in found:
        for line in re.sub(r"\\\n#?", " ", block.text).splitlines():
            if block.language == "":
                if not line.startswith("$ "):
                    continue
                line = line.removeprefix("$ ")
            words = shlex.split(line.partition(">")[0], comments=True)
            if words[:1] == ["gpd"]:
                yield block.page, words[1:]
