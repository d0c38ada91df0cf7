"""Fuzzing of the commands by broken files and options, which have to be refused in one sentence."""
