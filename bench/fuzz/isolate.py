"""Running a command in a forked process, with limits of time and memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        code: exit code of the command; negative for the signal that killed it.
        errors: output of the command to standard error.
        seconds: CPU time of the command in seconds.
        stopped: whether the command was stopped since it exceeded its time limit.
    """

    code: int
    errors: str
    seconds: float
    stopped: bool


def run_forked(
    folder: Path, arguments: list[str], seconds: int = 40, gibibytes: float = 3
) -> Outcome:
    """Run a command line of `gpd` in a fork of this process, which has imported everything.

    Args:
        folder: folder to run in.
        arguments: the command line, without the program's name.
        seconds: limit of CPU time in seconds; the limit of wall-clock time is ten times as long.
        gibibytes: limit of memory in GiB, in addition to the memory of this process.
    """
    errors = folder / ".errors"
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            code = _run(folder, arguments, errors, gibibytes)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    stopped = False
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if not stopped and time.monotonic() - start > 10 * seconds:
            os.kill(child, signal.SIGKILL)
            stopped = True
        time.sleep(0.005)
    text = errors.read_text(errors="replace")
    errors.unlink()
    code = os.waitstatus_to_exitcode(status)
    stopped = stopped or code == -signal.SIGXCPU
    taken = used.ru_utime + used.ru_stime
    return Outcome(code, text, taken, stopped)


def _run(folder: Path, arguments: list[str], errors: Path, gibibytes: float) -> int:
    from gpd_cli.__main__ import main

    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(gibibytes * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    code = main(arguments)
    sys.stderr.flush()
    return code
