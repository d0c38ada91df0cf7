"""The command line: options, their older forms, and messages about wrong options."""
