"""Record a run of the student: its layers, attribute reads, calls and constants.

`record` makes the run and returns a `Recording`.
"""
