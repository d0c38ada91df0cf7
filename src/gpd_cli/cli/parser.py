"""The parser of the command line, which does not mix up the defaults of different classes."""

from __future__ import annotations

import inspect
from argparse import Action
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from gpd_cli.cli.help import Page, groups

_CHOSEN = ("data", "model.method")
_HELP = {
    "--config": "a configuration: a file (YAML), or recipe:NAME (gpd recipes lists the names)",
    "--seed_everything": (
        "seed of weights, noise, and the order and augmentation of images; false sets no seed"
    ),
}


class Parser(LightningArgumentParser):
    """LightningCLI's parser, in which a class chosen by the user keeps its own defaults.

    By itself, jsonargparse passes the defaults of the default class on to the chosen class, for
    arguments of the same name: DKD would get the default temperature of KD, and a user's data
    module the batch size of `ImageData`.

    Attributes:
        page: what the help shows; None for all options.
    """

    page: Page | None = None

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """Add an option; some of Lightning's options get a help text that mentions recipes."""
        if (name := next((name for name in args if name in _HELP), None)) is not None:
            kwargs["help"] = _HELP[name]
        action: Action = super().add_argument(*args, **kwargs)
        return action

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """All defaults except those of classes' arguments, which are filled in after parsing."""
        defaults = super().get_defaults(skip_validation, **kwargs)
        for key in _CHOSEN:
            chosen = defaults.get(key)
            if isinstance(chosen, Namespace) and "init_args" in chosen:
                parameters = inspect.signature(locate(chosen.class_path)).parameters  # type: ignore[arg-type]
                for name, value in list(chosen.init_args.items(branches=True, nested=False)):
                    if name in parameters and value == parameters[name].default:
                        del chosen.init_args[name]
        return defaults

    def shown(self) -> list[Action]:
        """The options that the help shows."""
        if self.page is None:
            return list(self._actions)
        found = groups(self.page, self._actions)
        return [action for group in found for action in group._group_actions]

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text, with the options in the sections of `page`."""
        if self.page is None:
            return super().format_help(*args, **kwargs)
        before = self._action_groups, self.usage
        self._action_groups = groups(self.page, self._actions)  # type: ignore[assignment]
        self.usage = self.page.usage
        try:
            return super().format_help(*args, **kwargs)
        finally:
            self._action_groups, self.usage = before
