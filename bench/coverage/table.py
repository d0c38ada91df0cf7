"""Results of networks, stored as JSON lines, and the table made from these results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.markdown import table_lines

Result = Mapping[str, Any]
FAILED = ("inexact", "error")
"""Outcomes that are bugs, unlike a refusal or a limit."""

_HEAD = ("family", "network", "image", "relative error", "parameter ratio", "extraction", "trials")


def read_results(path: Path, key: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the latest result of each network.

    Args:
        path: path of a file of JSON lines; it need not exist, and its last line may be cut off.
        key: ``versions`` and ``settings``; results with other ones are ignored.

    Returns:
        The results by network.
    """
    results: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that was cut off when the run was stopped
        if all(result.get(name) == value for name, value in key.items()):
            results[result["name"]] = result
    return results


def append_result(path: Path, result: Result) -> None:
    """Add a result to a file of JSON lines.

    Args:
        path: path of the file, which is created if it does not exist.
        result: the result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith((b"\n",)) and path.stat().st_size
    with path.open("a") as file:
        file.write(("\n" if cut_off else "") + json.dumps(result) + "\n")


def summary(results: Iterable[Result], modules: int, networks: int) -> str:
    """The numbers of exact networks, in one line.

    Args:
        results: results of any networks.
        modules: number of all modules of timm.
        networks: number of all classification networks of torchvision.
    """
    exact = [result for result in results if result["outcome"] == "exact"]
    timm = sum(result["family"] not in ("", "torchvision") for result in exact)
    torchvision = sum(result["family"] == "torchvision" for result in exact)
    return f"{timm} of {modules} timm modules, {torchvision} of {networks} torchvision models"


def render(
    results: Sequence[Result],
    versions: Mapping[str, str],
    settings: Mapping[str, Any],
    modules: int,
    networks: int,
) -> str:
    """The text of the page: a summary, an explanation, and a row for each network.

    Args:
        results: results of any networks.
        versions: versions of the libraries, by name.
        settings: the settings ``ratio``, ``branches`` and ``steps``.
        modules: number of all modules of timm.
        networks: number of all classification networks of torchvision.

    Returns:
        Markdown.
    """
    dated = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Coverage",
        "",
        f"**{summary(results, modules, networks)}** expand exactly, train, and come back bit for "
        f"bit ({dated}).",
        "",
        "This page is the output of `make coverage`. Each network gets random weights and "
        f"statistics, is expanded at ratio {settings['ratio']:g} with {settings['branches']} "
        f"branches, takes {settings['steps']} optimizer steps, and is extracted.",
        "",
        "- network: in parentheses what it is built with, if not with its defaults (of networks "
        "with more than 30 million parameters, two of each run of equal blocks), with how many "
        "branches, if memory did not suffice for all, and how many modules keep their inside "
        "narrow, because no other exact way was found;",
        "- image: side of the images in pixels, a small one where the network allows it;",
        "- relative error: the larger one of eval and train mode, of the logits in float64, before "
        "the steps;",
        "- parameter ratio: the teacher's parameters, branches merged, over the student's "
        "(4 where every layer widens on both sides);",
        "- extraction: whether the extracted network and a fresh one that loads its weights, "
        "strictly, equal the student bit for bit after the steps;",
        "- trials: runs of parts of the network that led to nothing while its widening was found.",
    ]
    sections = {
        "timm: the smallest network of each module": [
            r for r in results if r["family"] not in ("", "torchvision")
        ],
        "torchvision": [r for r in results if r["family"] == "torchvision"],
        "Other networks": [r for r in results if not r["family"]],
    }
    for title, rows in sections.items():
        if rows:
            rows = sorted(rows, key=lambda r: (r["family"], r["name"]))
            lines += ["", f"## {title}", "", *table_lines(_HEAD, map(_cells, rows))]
    reasons = [
        f"- {result['name']}, `{module}`: {reason}."
        for result in results
        for module, reason in (result.get("narrow") or {}).items()
    ]
    if reasons:
        lines += ["", "## Modules that stay narrow inside", "", *reasons]
    return "\n".join(lines) + "\n"


def _cells(result: Result) -> list[str]:
    """The cells of a network's row; if the network is not exact, a reason in place of numbers."""
    name = result["name"].removeprefix("torchvision/")
    image = str(result["size"][-1]) if result.get("size") else ""
    notes = ["fewer blocks"] if result.get("shortened") else []
    if result.get("branches"):
        notes.append(f"{result['branches']} branches")
    if result.get("classes"):
        notes.append(f"num_classes={result['classes']}")
    if result.get("narrow"):
        notes.append(f"{len(result['narrow'])} modules narrow inside")
    note = f" ({', '.join(notes)})" if notes else ""
    cells = [result["family"] or "-", name + note, image]
    if result["outcome"] == "exact":
        worst = max(result["eval_error"], result["train_error"])
        ratio = result["wide_parameters"] / result["parameters"]
        trials = str(result.get("trials", ""))
        return [*cells, f"{worst:.0e}", f"{ratio:.2f}", "exact", trials]
    reason = str(result["reason"]).replace("|", "\\|").replace("\n", " ")
    return [*cells, f"{result['outcome']}: {reason}", "", "", ""]
