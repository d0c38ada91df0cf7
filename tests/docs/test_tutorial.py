"""The tutorial, command by command, with the installed wheel and away from the repository."""

import csv
import os
import re
import subprocess
from pathlib import Path

import pytest

from documentation import ROOT, blocks, python_file

PAGE = "docs/tutorial.md"
KINDS = ("sea", "forest", "city", "rose")
# A module that is not to be imported: the script is to need onnxruntime and Pillow alone.
ALONE = """\
import runpy, sys
sys.modules.update(dict.fromkeys(["gpd_cli", "torch", "timm", "torchvision", "lightning", "onnx"]))
program, *pictures = sys.argv[1:]
for picture in pictures:
    sys.argv = [program, picture]
    runpy.run_path(program)
"""


def lines() -> list[str]:
    """The commands of the tutorial, in order."""
    return [line for block in blocks("sh", page=PAGE) for line in block.text.splitlines()]


def test_six_commands_and_ten_lines() -> None:
    assert len(lines()) == 6
    assert lines()[0].startswith("pip install '.[") and lines()[-1].startswith("python ")
    script = python_file(PAGE, "classify.py", "onnxruntime").splitlines()
    assert len([line for line in script if line and not line.startswith("#")]) == 10


@pytest.mark.slow
def test_from_photos_to_the_name_of_a_new_picture(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("plotly")
    for name in ("make_photos.py", "classify.py"):
        (tmp_path / name).write_text(python_file(PAGE, name, "import"))
    python = str(installed / "python")
    search = [python, "-c", "import gpd_cli, sys; sys.stdout.write(gpd_cli.__file__)"]
    assert ROOT not in Path(run(search, tmp_path)).parents
    run([python, "make_photos.py"], tmp_path)
    assert len(list(tmp_path.glob("photos/*/*.jpg"))) == 200

    _, *gpd, classify = lines()  # the first one is what the fixture has done
    said = {line: run(["bash", "-c", line], tmp_path, installed) for line in gpd}
    (best,) = re.findall(r"best epoch +\d+ of \d+: student (\S+),", said[gpd[0]])
    assert float(best) > 50  # one in four by chance

    # The report has both runs.
    assert (tmp_path / "compared.html").stat().st_size > 100_000
    assert "| model.ratio | 2.0 | 1.0 |" in (tmp_path / "compared.md").read_text()

    # What the file says of the test images is what the log of the checkpoint says.
    checkpoint = "runs/photos/version_0/checkpoints/best.ckpt"
    run([str(installed / "gpd"), "predict", "--ckpt_path", checkpoint], tmp_path)
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    program, new = classify.split()[1:]
    files = [new, *(row["file"] for row in rows)]
    first, *named = run([python, "-c", ALONE, program, *files], tmp_path).split()
    assert first in KINDS
    assert named == [row["student_class"] for row in rows]


def run(command: list[str], folder: Path, programs: Path | None = None) -> str:
    """What a command says, run in a folder with an environment's programs first."""
    path = os.environ["PATH"]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": path if programs is None else f"{programs}{os.pathsep}{path}",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
