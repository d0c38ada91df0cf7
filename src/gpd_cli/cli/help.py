"""What the page of `gpd COMMAND --help` shows: gpd's own options, sorted into sections.

The many options of Lightning's Trainer have a page of their own (``--help-trainer``).
"""

from __future__ import annotations

from argparse import Action
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

HELP_TRAINER = "--help-trainer"
_TRAINER = "Lightning's Trainer"
HELP_GROUPS = {
    HELP_TRAINER: ("trainer", _TRAINER),
    "--trainer.help": ("trainer", _TRAINER),
    "--model.optimizer.help": ("model.optimizer", "optimizer and schedule"),
    "--model.static_teacher.help": ("model.static_teacher", "static teacher"),
}
"""Options that ask for help on a group of options, with the group's name and the page's title.

For groups that are the arguments of a class that users choose, jsonargparse itself has such an
option (``--data.help``).
"""


@dataclass(frozen=True)
class Section:
    """A section of a help page: options that belong together.

    Args:
        title: title of the section.
        patterns: patterns (fnmatch) of names of options; an option is shown in the first section
            with a pattern that matches the name.
        text: text that is shown before the options.
    """

    title: str
    patterns: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True)
class Page:
    """The content of a command's help page.

    Args:
        usage: the command's usage, in one line.
        sections: sections of the page, in order; options that are in no section are not shown.
    """

    usage: str
    sections: tuple[Section, ...] = ()


_RUN = (
    *("-h", "-c", "--print_config*", "--ckpt_path", "--images", "--output", "--top", "--plan"),
    *("--dry_run", "--verbose", "--seed_everything"),
)
_RESUMING = (
    "--resume RUN continues an interrupted run in its folder RUN (runs/digits/version_0), with the "
    "run's own configuration and from its newest checkpoint."
)
_MODEL = (
    Section(
        "student and dynamic teacher",
        (
            *("--model.student*", "--model.num_classes", "--model.ratio", "--model.branch*"),
            *("--model.noise", "--model.storage", "--model.exclude", "--model.width_multiple"),
            "--model.shared*",
        ),
    ),
    Section("loss", ("--model.gap_*", "--model.ce_weight", "--model.label_smoothing")),
    Section(
        "static teacher",
        ("--model.static_*", "--model.assistants*", "--model.method*", "--model.stages"),
    ),
    Section("optimizer and schedule", ("--model.optimizer*",)),
    Section("further settings of the model", ("--model.?*",)),
)


@dataclass
class Group:
    """A stand-in for argparse's groups of options, with the attributes that printing help reads."""

    title: str
    description: str | None
    _group_actions: list[Action] = field(default_factory=list)


def groups(page: Page, actions: Sequence[Action]) -> list[Group]:
    """Sort a parser's options into the sections of a page.

    Args:
        page: the help page.
        actions: the parser's options.

    Returns:
        A group for each section, in the page's order.
    """
    found = [Group(section.title, section.text or None) for section in page.sections]
    for action in actions:
        for section, group in zip(page.sections, found, strict=True):
            if _fits(action, section.patterns):
                group._group_actions.append(action)
                break
    return found


def page_of(command: str, expanding: Sequence[str]) -> Page:
    """The help page of a command.

    Args:
        command: name of one of LightningCLI's subcommands.
        expanding: names of the model's settings that `expand` uses.
    """
    usage = f"gpd {command} [-c CONFIG] [options]"
    run = Section("run", _RUN, _RESUMING if command == "fit" else "")
    if command == "expand":
        text = (
            "A configuration of fit can be given as well; expand ignores the options that it does "
            "not need."
        )
        options = tuple(f"--model.{name}" for name in expanding)
        return Page(usage, (run, Section("student and dynamic teacher", options, text)))
    data = Section(
        "data",
        ("--data", "--data.*"),
        "Options of the data are --data.dataset, --data.root, --data.image_size, --data.batch_size "
        f"and others; see gpd {command} --data.help ImageData",
    )
    trainer = Section(
        _TRAINER,
        (),
        "Options of the Trainer are --trainer.max_epochs, --trainer.devices, --trainer.precision "
        f"and others; see gpd {command} {HELP_TRAINER}",
    )
    if command != "fit":
        text = "The settings of the model come from the checkpoint; gpd fit --help explains them."
        return Page(usage, (run, data, Section("model", (), text), trainer))
    return Page(usage, (run, *_MODEL, data, trainer))


def group_page(command: str, option: str) -> Page:
    """The help page on one group of options.

    Args:
        command: name of one of LightningCLI's subcommands.
        option: a key of `HELP_GROUPS`, such as ``--help-trainer``.
    """
    group, title = HELP_GROUPS[option]
    usage = f"gpd {command} [--{group}.OPTION VALUE ...]"
    return Page(usage, (Section(title, (f"--{group}.*",)),))


def _fits(action: Action, patterns: Sequence[str]) -> bool:
    names = action.option_strings
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
