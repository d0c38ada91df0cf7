"""The parser of the command line, which keeps the defaults of classes apart."""

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
    "--seed_everything": "the seed of weights, noise, the order of images and their augmentation; "
    "false leaves the generators as they are",
}


class Parser(LightningArgumentParser):
    """LightningCLI's parser, in which a chosen class has its own defaults.

    By itself jsonargparse passes defaults of the default class on to the chosen class, where
    arguments have the same names: DKD would get the default temperature of KD, and a user's data
    module the batch size of `ImageData`. Help is that of `page`, if one is set.
    """

    page: Page | None = None

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """Add an option, some of Lightning's with another text: it knows no recipes."""
        if (name := next((name for name in args if name in _HELP), None)) is not None:
            kwargs["help"] = _HELP[name]
        action: Action = super().add_argument(*args, **kwargs)
        return action

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """All defaults except those of classes' arguments, which parsing fills in at the end."""
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
        """The options that help shows."""
        if self.page is None:
            return list(self._actions)
        found = groups(self.page, self._actions)
        return [action for group in found for action in group._group_actions]

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The options by section, as the page has them."""
        if self.page is None:
            return super().format_help(*args, **kwargs)
        before = self._action_groups, self.usage
        self._action_groups = groups(self.page, self._actions)  # type: ignore[assignment]
        self.usage = self.page.usage
        try:
            return super().format_help(*args, **kwargs)
        finally:
            self._action_groups, self.usage = before
