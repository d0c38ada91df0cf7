"""Calling a function in a new process, so that one measurement does not influence the next."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a new process, and return its result.

    Args:
        function: the function. It must not be defined in the module that ``python -m PACKAGE``
            runs (``__main__``), since the new process does not import this module.
        arguments: arguments of the function.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
