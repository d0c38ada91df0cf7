"""Running a function for several tasks, each in its own process with limits of time and memory."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GIB = 2**30
Report = Callable[[str], None]
Work = Callable[[str, Report], dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """Limits of one task.

    Args:
        seconds: limit of wall-clock time in seconds.
        gibibytes: limit of resident memory in GiB; checked only on systems with ``/proc``.
    """

    seconds: float
    gibibytes: float


@dataclass
class _Job:
    task: str
    process: multiprocessing.process.BaseProcess
    connection: Connection
    start: float = field(default_factory=time.monotonic)
    stage: str = "import"


def run_isolated(
    tasks: Iterable[str],
    work: Work,
    limits: Limits,
    jobs: int = 1,
    preload: Iterable[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run tasks in separate processes, and yield each result as it comes.

    Args:
        tasks: the tasks, which are texts that `work` takes.
        work: function that runs a task and returns its result. Its second argument is a function to
            call with the name of each stage of the task. `work` has to be picklable.
        limits: limits of each task; a process that exceeds a limit is killed.
        jobs: number of processes that run at the same time.
        preload: names of modules that are imported once, in the server process from which the
            others are forked.

    Yields:
        Each task, and its result with ``seconds`` and ``gibibytes`` (peak memory) added. If `work`
        did not return, ``outcome`` is ``limit`` (with ``out_of_memory`` for the memory limit) or
        ``error``, and ``reason`` gives the cause.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting, running = list(reversed(list(tasks))), list[_Job]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, task, theirs), daemon=True)
                process.start()
                theirs.close()
                running.append(_Job(task, process, mine))
            wait([job.connection for job in running], timeout=0.2)
            for job in list(running):
                result = _look_at(job, limits)
                if result is not None:
                    running.remove(job)
                    result.setdefault("seconds", round(time.monotonic() - job.start, 1))
                    yield job.task, result
    finally:
        for job in running:
            _end(job)


def _look_at(job: _Job, limits: Limits) -> dict[str, Any] | None:
    """The result of a job, or None while the job runs within its limits."""
    while job.connection.poll():
        try:
            message = job.connection.recv()
        except EOFError:
            _end(job)
            code = job.process.exitcode
            if code == -signal.SIGKILL:  # the system kills processes when it is short of memory
                return _out_of_memory(f"killed by the system, in stage '{job.stage}'")
            return _failure("error", f"the process died ({code}) in stage '{job.stage}'")
        if isinstance(message, dict):
            _end(job)
            return message
        if job.stage == "import":
            job.start = time.monotonic()  # the time of imports does not count
        job.stage = message
        logging.debug("%s: %s", job.task, message)
    if time.monotonic() - job.start > limits.seconds:
        _end(job)
        return _failure("limit", f"more than {limits.seconds:g} s, in stage '{job.stage}'")
    if _resident(job.process.pid) > limits.gibibytes * GIB:
        _end(job)
        reason = f"more than {limits.gibibytes:g} GiB of memory, in stage '{job.stage}'"
        return _out_of_memory(reason)
    return None


def _failure(outcome: str, reason: str) -> dict[str, Any]:
    return {"outcome": outcome, "reason": reason}


def _out_of_memory(reason: str) -> dict[str, Any]:
    return _failure("limit", reason) | {"out_of_memory": True}


def _end(job: _Job) -> None:
    job.process.join(0.5)  # a process that has sent its result ends by itself
    job.process.kill()
    job.process.join()
    job.connection.close()


def _child(work: Work, task: str, connection: Connection) -> None:
    """Run a task in this process, and send messages through a connection to the parent process.

    The name of each stage is sent as text, and finally the result as a dictionary.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    start = time.monotonic()
    stage = "import"

    def report(text: str) -> None:
        nonlocal stage
        stage = text
        connection.send(text)

    try:
        result = work(task, report)
    except MemoryError:
        result = _out_of_memory(f"out of memory, in stage '{stage}'")
    except Exception as error:
        text = " ".join(str(error).split())
        result = _failure("error", f"{type(error).__name__} in stage '{stage}': {text}")
        result["traceback"] = traceback.format_exc()
    # Linux counts KiB, macOS bytes, which is corrected below.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result |= {
        "seconds": round(time.monotonic() - start, 1),
        "gibibytes": round(peak / (1024 if os.uname().sysname == "Darwin" else 1) / GIB, 2),
    }
    connection.send(result)


def _resident(pid: int | None) -> int:
    """Resident memory of a process in bytes; 0 on systems without ``/proc``."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * resource.getpagesize()
