"""The recording of one run of the student: layers, attribute reads, calls, constants."""
