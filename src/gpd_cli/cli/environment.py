"""A record of how a run was started: command line, versions, machine, and state of the code."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpd_cli.files import atomic_path
from gpd_cli.run_folder import ENVIRONMENT

_PACKAGES = (
    *("gpd-cli", "torch", "torchvision", "lightning", "timm", "torchmetrics", "jsonargparse"),
    *("numpy", "pillow"),
)


def write_environment(folder: Path, arguments: list[str], processes: int, step: int) -> None:
    """Add an entry to the list in the file `ENVIRONMENT` in a run's folder.

    Args:
        folder: folder of the run.
        arguments: the command line, without the program's name.
        processes: number of processes that train together.
        step: number of updates that the run has made already; 0 when a run begins.

    Raises:
        GpdError: when the file cannot be written.
    """
    path = folder / ENVIRONMENT
    entries: list[Any] = []
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        entries = found if isinstance(found, list) else []
    entries.append(
        {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": f"gpd {shlex.join(arguments)}",
            "folder": str(Path.cwd()),
            "from_step": step,
            "processes": processes,
            "versions": {"python": platform.python_version(), **_versions()},
            "machine": _machine(),
            "git": git_state(Path.cwd()),
            "git_of_gpd": git_state(Path(__file__).parent, untracked=True),
        }
    )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1) + "\n")


@dataclass(frozen=True)
class Start:
    """The time of a start or resumption of a run, and the run's progress at that time.

    Args:
        time: seconds since 1970.
        step: number of updates that the run had made already.
    """

    time: float
    step: int


def latest_entry(folder: Path) -> dict[str, Any]:
    """Read what `write_environment` wrote at a run's latest start; empty if it is not known.

    Args:
        folder: folder of the run.
    """
    try:
        entry = json.loads((folder / ENVIRONMENT).read_text())[-1]
    except (OSError, ValueError, TypeError, LookupError):
        return {}
    return entry if isinstance(entry, dict) else {}


def latest_start(folder: Path) -> Start | None:
    """Read the latest start of a run from the file `ENVIRONMENT`; None if it is not known.

    Unlike the times of files, this information survives copying the folder.

    Args:
        folder: folder of the run.
    """
    entry = latest_entry(folder)
    try:
        time = datetime.fromisoformat(entry["time"]).timestamp()
        return Start(time, int(entry["from_step"]))
    except (ValueError, TypeError, LookupError):
        return None


def git_state(folder: Path, untracked: bool = False) -> dict[str, Any] | None:
    """Commit, branch and changed files of the Git repository that a folder is in; None without one.

    Args:
        folder: any folder.
        untracked: whether files that were never added to the repository count as changed.
    """
    new = f"--untracked-files={'normal' if untracked else 'no'}"
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {
            "commit": commit,
            "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
            "changed": _git(folder, "status", "--porcelain", new).splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, timeout=10)
    return done.stdout.decode(errors="backslashreplace").strip("\n")  # names may be invalid UTF-8


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """The name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"


def _machine() -> dict[str, Any]:
    found = {
        "system": platform.platform(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "byteorder": sys.byteorder,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found
