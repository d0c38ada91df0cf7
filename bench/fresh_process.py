"""Functions that are called in processes of their own, so that one measurement leaves no trace."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """The result of a function that is called in a process of its own.

    Args:
        function: a function of any module but a package's ``__main__``: the new process does not
            import what ``python -m PACKAGE`` runs, and finds nothing that is defined there.
        arguments: what it is called with.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
