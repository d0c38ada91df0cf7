"""The demo on real images: fit with and without the method, extract, evaluate, compare."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

HERE = Path(__file__).parent
RUNS = Path("runs")
CONFIG = HERE.parent / "configs" / "digits.yaml"
ALONE = ("--model.ratio", "1", "--model.branches", "1")


def main() -> None:
    """Run the demo from start to end."""
    folder = RUNS / "demo"
    for name in ("gpd", "alone"):  # the folder may hold other runs, of a demo.yaml
        shutil.rmtree(folder / name, ignore_errors=True)
    fit("gpd")
    fit("alone", *ALONE)
    files = {
        "student": extract("gpd", folder / "student.safetensors"),
        "teacher": extract("gpd", folder / "teacher.pt2", "--which", "teacher"),
        "alone": extract("alone", folder / "alone.safetensors"),
    }
    scores = evaluate(files)
    best = best_epoch(folder / "gpd" / "metrics.csv")
    report(scores, best, files["student"])


def gpd(*arguments: str) -> None:
    """Run a gpd command and show its output."""
    print("$ gpd", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "gpd_cli", *arguments], check=True)


def fit(name: str, *options: str) -> None:
    """Train into runs/demo/NAME."""
    logger = "--trainer.logger.init_args."
    gpd(
        "fit",
        "-c",
        os.path.relpath(CONFIG),
        *options,
        f"{logger}name",
        "demo",
        f"{logger}version",
        name,
    )


def extract(run: str, output: Path, *options: str) -> Path:
    """Extract the best checkpoint of a run."""
    best = RUNS / "demo" / run / "checkpoints" / "best.ckpt"
    gpd("extract", "--ckpt_path", str(best), "--output", str(output), *options)
    return output


def evaluate(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Accuracies and wrong images by network and split, by a process that does not import gpd."""
    command = [sys.executable, str(HERE / "evaluate.py"), *map(str, files.values())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(files, lines, strict=True))


def best_epoch(metrics: Path) -> dict[str, float]:
    """The logged validation accuracies of the epoch of best.ckpt (the first best epoch)."""
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/student_top1"]]
    best = max(rows, key=lambda row: float(row["val/student_top1"]))
    return {name: float(best[f"val/{name}_top1"]) for name in ("student", "teacher")}


def compared(student: list[int], alone: list[int]) -> str:
    """What the difference of two students is worth, by McNemar's exact test.

    Args:
        student: the test images that the student trained with gpd gets wrong.
        alone: those that the student trained alone gets wrong.
    """
    better, worse = len(set(alone) - set(student)), len(set(student) - set(alone))
    if not better + worse:
        return "both students are right on the same test images"
    # Were both as good, each image that only one gets right would be the throw of a fair coin.
    chance = binomtest(better, better + worse).pvalue
    return (
        f"test images that only one student gets right: {better} with gpd, {worse} alone "
        f"(chance makes as great a difference in {100 * chance:.0f} % of cases)"
    )


def report(scores: dict[str, dict[str, Any]], logged: dict[str, float], student: Path) -> None:
    """Print the comparison; fail if an extracted file does not have the logged accuracy."""
    print("\naccuracy (%) of the extracted files, plain PyTorch   validation     test")
    titles = {
        "alone": "student trained alone",
        "student": "student trained with gpd",
        "teacher": "its dynamic teacher",
    }
    for name, title in titles.items():
        values = scores[name]
        print(f"  {title:50} {values['validation']:10.2f} {values['test']:8.2f}")
    gap = {k: scores["teacher"][k] - scores["student"][k] for k in ("validation", "test")}
    print(f"  {'gap (points)':50} {gap['validation']:10.2f} {gap['test']:8.2f}")
    print(compared(scores["student"]["wrong"]["test"], scores["alone"]["wrong"]["test"]))
    for name in ("student", "teacher"):
        same = abs(scores[name]["validation"] - logged[name]) < 1e-4
        sign = "=" if same else "is NOT"
        print(
            f"{name}: extracted {scores[name]['validation']:.4f} {sign} logged {logged[name]:.4f}"
        )
        if not same:
            sys.exit(1)
    print(f"\nThe deployable student is {student}; the gap over epochs is runs/demo/gpd/gap.png.")


if __name__ == "__main__":
    main()
