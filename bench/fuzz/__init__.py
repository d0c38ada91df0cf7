"""Broken files and options given to the commands: each has to be refused in one sentence."""
