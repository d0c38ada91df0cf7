"""What a record says about how its run was made: code, libraries, hardware, configuration."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.results.records import DATA, write_text
from gpd_cli.run_folder import ENVIRONMENT

_CODE = "code.json"
_LIBRARIES = ("gpd-cli", "torch", "torchvision", "lightning", "timm")


def code_commit(root: Path = Path()) -> str | None:
    """The commit of the code in a checkout.

    Args:
        root: folder of the checkout.

    Returns:
        The commit, followed by ``+`` if ``src`` or ``configs`` have uncommitted changes; None
        without Git or outside a checkout.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "configs")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_code(attempt: Path) -> None:
    """Write down, at the start of an attempt, the commit of the code and versions of libraries.

    They are written then since another version of the code may make the record.

    Args:
        attempt: folder of the attempt.
    """
    versions = {name: version(name).partition("+")[0] for name in _LIBRARIES}
    write_text(attempt / _CODE, json.dumps({"commit": code_commit(), "versions": versions}))


def trained_by(attempts: Sequence[Path]) -> dict[str, Any]:
    """The version of the code that trained.

    Args:
        attempts: folders of the attempts that trained a part of the run.

    Returns:
        ``versions`` of libraries in the latest attempt, and ``commit``: None if it is not known;
        all commits in order if attempts had different ones.
    """
    paths = [attempt / _CODE for attempt in attempts]
    found = [json.loads(path.read_text()) if path.is_file() else {} for path in paths]
    commits = list(dict.fromkeys(code.get("commit") or "unknown" for code in found))
    return {
        "versions": found[-1].get("versions", {}),
        "commit": None if commits == ["unknown"] else ", ".join(commits),
    }


def on_gpu(config: Mapping[str, Any]) -> bool:
    """Whether a run of this configuration trains on a GPU of this machine."""
    return config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available()


def hardware(attempt: Path, config: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What a run was trained on: ``device``, on a CPU also ``threads``; ``processes`` if several.

    Args:
        attempt: folder of the run's last attempt, in which the run has written at its start how
            many processes it has.
        config: configuration of the run.
        threads: number of threads of each process.
    """
    if on_gpu(config):
        found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    else:
        found = {"device": _processor(), "threads": threads}
    path = attempt / ENVIRONMENT
    processes = int(json.loads(path.read_text())[-1]["processes"]) if path.is_file() else 1
    return found if processes == 1 else {**found, "processes": processes}


def portable(config: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """Settings of model, data and trainer, without those that depend on the machine.

    Args:
        config: configuration of a run.
        root: folder of the data on this machine, which is replaced by `DATA`; None if the table's
            configuration names the folder.
    """
    kept = {name: dict(config[name]) for name in ("model", "data", "trainer")}
    if root is not None:
        kept["data"]["init_args"]["root"] = DATA
    for name in ("logger", "callbacks", "default_root_dir"):
        kept["trainer"].pop(name, None)
    return {"seed_everything": config.get("seed_everything"), **_without_nulls(kept)}


def _without_nulls(value: Any) -> Any:
    """Remove options that are null from a configuration, at all levels."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "CPU")
