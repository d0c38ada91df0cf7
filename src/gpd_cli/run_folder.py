"""Names of the files in the folder of a run.

``runs/NAME/version_N/`` has these files, and its checkpoints in the folder `CHECKPOINTS` inside.
"""

CONFIGURATION = "config.yaml"
"""All settings of the run."""

METRICS = "metrics.csv"
"""What the run has logged, by epoch and step."""

ENVIRONMENT = "environment.json"
"""Each start of the run: time, versions of libraries, hardware, number of processes."""

GAP = "gap.png"
"""Accuracies and gap over epochs, as a picture."""

REPORT = "report.html"
"""The report of the run, as a page."""

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints within the folder of the run."""

BEST = "best.ckpt"
"""The checkpoint with the student's best validation accuracy."""

GIVEN_UP = "best_given_up.ckpt"
"""The former ``best.ckpt`` of a run that was put back to a checkpoint from before it."""

LAST = "last.ckpt"
"""The checkpoint from which the run is resumed; written after every epoch, and within long ones."""

STOPPED = "stopped.ckpt"
"""The checkpoint of a run that was stopped within an epoch."""
