"""What the commands `expand` and `extract` do, as functions."""
