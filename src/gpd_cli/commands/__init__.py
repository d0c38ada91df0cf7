"""The commands: `expand` and `extract` as functions, the others as methods of the Trainer."""
