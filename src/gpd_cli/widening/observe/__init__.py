"""One run of the student, recorded: layers, reads, calls, constants."""
