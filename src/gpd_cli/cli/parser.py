"""The parser of the command line."""

from __future__ import annotations

import inspect
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

_CHOSEN = ("data", "model.method")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, where a class that is chosen starts from its own defaults.

    By itself jsonargparse hands the defaults of the class that would be taken otherwise on to the
    chosen one where their arguments have the same names: DKD would start from the temperature of
    KD, and data of one's own from the batch size of `ImageData`.
    """

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """All defaults but those of arguments of classes, which parsing fills in at its end."""
        defaults = super().get_defaults(skip_validation, **kwargs)
        for key in _CHOSEN:
            chosen = defaults.get(key)
            if isinstance(chosen, Namespace) and "init_args" in chosen:
                parameters = inspect.signature(locate(chosen.class_path)).parameters  # type: ignore[arg-type]
                for name, value in list(chosen.init_args.items(branches=True, nested=False)):
                    if name in parameters and value == parameters[name].default:
                        del chosen.init_args[name]
        return defaults
