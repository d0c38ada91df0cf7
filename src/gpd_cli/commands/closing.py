"""The summary that `fit` prints at its end: scores, duration, files, and commands to type next."""

from __future__ import annotations

import shlex

from gpd_cli.files import short_path
from gpd_cli.report.run import Run
from gpd_cli.run_folder import BEST, CHECKPOINTS, CONFIGURATION, GAP, LAST, METRICS, REPORT

_FILES = (METRICS, CONFIGURATION, GAP, REPORT)
_INDENT = 14


def closing_lines(run: Run, seconds: float, report: str = "", went_on: bool = False) -> list[str]:
    """The lines of the summary of a run that has ended.

    Args:
        run: the run, as read from its folder.
        seconds: duration in seconds since the run was started or resumed.
        report: if no report was written, the reason; otherwise empty.
        went_on: whether the run was resumed in its own folder, whose log also has the epochs before
            the interruption.
    """
    took = f"{_in_words(seconds)}, {_epochs(run)}"
    if went_on:
        took = f"{_in_words(seconds)} since the run was resumed; {_epochs(run)} in all"
    facts = [*_accuracies(run), ("took", took)]
    if (static := run.epochs[max(run.epochs)].get("val/static_top1")) is not None:
        facts.insert(1, ("static teacher", f"{static:.2f}"))
    checkpoints = [name for name in (BEST, LAST) if run.checkpoint(name)]
    if checkpoints:
        facts.append(("files", f"{short_path(run.folder / CHECKPOINTS)}: {', '.join(checkpoints)}"))
    others = [name for name in _FILES if (run.folder / name).is_file()]
    facts.append(("" if checkpoints else "files", f"{short_path(run.folder)}: {', '.join(others)}"))
    if report:
        facts.append(("report", report))
    commands = next_commands(run)
    facts += [("next" if k == 0 else "", command) for k, command in enumerate(commands)]
    return [f"{name:{_INDENT}}  {text}" for name, text in facts]


def next_commands(run: Run) -> list[str]:
    """Commands for the run's best checkpoint, which test the student and export it."""
    chosen = run.checkpoint(BEST) or run.checkpoint(LAST)
    if chosen is None:
        return []
    path = shlex.quote(short_path(chosen))
    student = shlex.quote(short_path(run.folder / "student.safetensors"))
    return [
        f"gpd test --ckpt_path {path}",
        f"gpd extract --ckpt_path {path} --output {student}",
    ]


def _accuracies(run: Run) -> list[tuple[str, str]]:
    best, last = run.best_epoch, max(run.epochs)
    stage, number = ("val", best) if best is not None else ("train", last)
    values = run.epochs[number]
    names = {"student": "student_top1", "teacher": "teacher_top1", "gap": "gap"}
    scores = [
        f"{name} {values[key]:.2f}"
        for name, entry in names.items()
        if (key := f"{stage}/{entry}") in values
    ]
    if best is not None:
        return [("best epoch", f"{best} of {last}: {', '.join(scores)} (validation, %)")]
    return [("last epoch", f"{last}: {', '.join(scores)} (training, %; nothing was validated)")]


def _epochs(run: Run) -> str:
    count = len(run.own_epochs)
    return f"{count} epoch{'' if count == 1 else 's'}"


def _in_words(seconds: float) -> str:
    """Format a duration in its two largest units.

    Example:
        >>> _in_words(4.2), _in_words(130), _in_words(7500)
        ('4 s', '2 min 10 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
