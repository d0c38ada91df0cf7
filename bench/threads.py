"""How many threads each of several processes gets."""

from __future__ import annotations

import os


def threads_per_process(jobs: int) -> int:
    """Threads of each process: OMP_NUM_THREADS where it is set, else the cores divided by `jobs`.

    Threads that share a core with other work wait for each other in loops: on a busy machine one
    thread can be many times as fast as two.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, (os.cpu_count() or 1) // jobs)
