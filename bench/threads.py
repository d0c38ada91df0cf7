"""The number of threads for each of several processes that share a machine."""

from __future__ import annotations

import os


def threads_per_process(jobs: int) -> int:
    """The number of threads of each process: OMP_NUM_THREADS if set, else the cores over `jobs`.

    More threads than cores are harmful: threads that share a core with other work wait for each
    other in busy loops, so that on a busy machine one thread can be many times as fast as two.

    Args:
        jobs: number of processes that run at the same time.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, (os.cpu_count() or 1) // jobs)
