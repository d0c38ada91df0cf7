"""The parser of the command line, which keeps the defaults of classes apart."""

from __future__ import annotations

import inspect
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

_CHOSEN = ("data", "model.method")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, in which a chosen class has its own defaults.

    By itself jsonargparse passes defaults of the default class on to the chosen class, where
    arguments have the same names: DKD would get the default temperature of KD, and a user's data
    module the batch size of `ImageData`.
    """

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
