"""What holds for all tests: their random state, their share of the cores, and their order."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

# Before the tests import anything else, as in the program: Python keeps one object for the types
# `int | float` and `float | int`, so that otherwise what is imported first decides whether the
# option --trainer.limit_train_batches 1 is one batch or all of them.
import gpd_cli.cli.command_line  # noqa: F401
from wheels import build_wheel, install

BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a machine with a time limit leave out slow tests, but only these."""
    parser.addoption(
        "--slow-seconds",
        type=float,
        metavar="N",
        help="skip the slow tests that have not begun N seconds after the start; by default none",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow tests last, so that every other one has run when the time for these is up."""
    items.sort(key=is_slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--slow-seconds")
    if limit is not None and is_slow(item) and time.monotonic() - BEGIN > limit:
        pytest.skip(f"a slow test, and {limit:.0f} seconds have passed")


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def pytest_configure() -> None:
    """Let tests that run side by side share the cores, and let all of them be interrupted.

    A shell ignores SIGINT in what it starts in the background, and so would the commands that tests
    start and then stop by this signal.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for processes that tests start


# Torch gives some warnings once in a process, and the first test that caused one would alone fail.
torch.set_warn_always(True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    return install(build_wheel(folder), folder / "environment")
