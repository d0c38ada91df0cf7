"""Every test starts from the same random state, whatever ran before it."""

import os
import signal
from pathlib import Path

import pytest
import torch

# Before the tests import anything else, as in the program: Python keeps one object for the types
# `int | float` and `float | int`, so that otherwise what is imported first decides whether the
# option --trainer.limit_train_batches 1 is one batch or all of them.
import gpd_cli.cli.command_line  # noqa: F401
from wheels import build_wheel, install


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
