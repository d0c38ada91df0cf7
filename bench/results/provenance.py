"""What a record says about how its run was made: code, libraries, hardware, configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.results.records import DATA
from gpd_cli.cli.environment import latest_entry, processor

_LIBRARIES = ("gpd-cli", "torch", "torchvision", "lightning", "timm")
_CODE = re.compile(r"...\"?(src|configs)/")  # a line of `git status --porcelain`


def trained_by(attempts: Sequence[Path]) -> dict[str, Any]:
    """The versions of libraries and code that trained a run; another version may make the record.

    Args:
        attempts: folders of the attempts that trained a part of the run.

    Returns:
        ``versions`` of libraries in the latest attempt, and ``commit``: followed by ``+`` if files
        in ``src`` or ``configs`` had uncommitted changes; all commits in order if attempts had
        different ones; None if it is not known.
    """
    starts = [latest_entry(attempt) for attempt in attempts]
    versions = starts[-1].get("versions", {})
    commits = list(dict.fromkeys(_commit(start) for start in starts))
    return {
        "versions": {
            name: versions[name].partition("+")[0] for name in _LIBRARIES if name in versions
        },
        "commit": None if commits == ["unknown"] else ", ".join(commits),
    }


def on_gpu(config: Mapping[str, Any]) -> bool:
    """Whether a run of this configuration trains on a GPU of this machine."""
    return config["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available()


def hardware(
    attempts: Sequence[Path], config: Mapping[str, Any], threads: int
) -> tuple[dict[str, Any], bool]:
    """The hardware that a run was trained on, which may not be the machine that makes the record.

    Args:
        attempts: folders of the attempts that trained a part of the run, in each of which the run
            has written its machine and its number of processes.
        config: configuration of the run.
        threads: number of threads of each process.

    Returns:
        ``device``, on a CPU also ``instructions`` (the vector instructions that torch uses, where
        they are known) and ``threads``, and ``processes`` if several, of the last attempt; and
        whether all attempts had the same.
    """
    found = [_hardware(latest_entry(attempt), config, threads) for attempt in attempts]
    return found[-1], all(one == found[-1] for one in found)


def _hardware(start: Mapping[str, Any], config: Mapping[str, Any], threads: int) -> dict[str, Any]:
    machine, processes = start.get("machine", {}), int(start.get("processes", 1))
    if on_gpu(config):
        found: dict[str, Any] = {"device": machine.get("gpu") or torch.cuda.get_device_name()}
    else:
        # Earlier versions did not write the processor's name, but what is "instructions" now.
        is_named = "instructions" in machine
        found = {"device": machine["processor"] if is_named else processor()}
        if is_named:  # processors of one name may have other instructions, and another speed
            found["instructions"] = machine["instructions"]
        found["threads"] = threads
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


def _commit(start: Mapping[str, Any]) -> str:
    state = start.get("git_of_gpd")
    if state is None:
        return "unknown"
    changed = any(_CODE.match(line) for line in state["changed"])
    return f"{state['commit']}{'+' if changed else ''}"


def _without_nulls(value: Any) -> Any:
    """Remove options that are null from a configuration, at all levels."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
