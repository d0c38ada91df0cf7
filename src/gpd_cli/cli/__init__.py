"""The command line: options, their older forms, and what is told about a wrong one."""
