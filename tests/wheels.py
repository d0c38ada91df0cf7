"""The package as users get it: built into a wheel and installed, away from the repository."""

import shutil
import site
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PIP = [sys.executable, "-m", "pip", "--quiet"]


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, which is then removed."""
    copy = folder / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(copy)], check=True)
    shutil.rmtree(copy)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment, and return the folder of its programs.

    The packages that it needs are those of this interpreter. They are found by their folders, in
    which Python does not follow the links of packages that are installed for editing: the
    repository is out of reach.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    programs = folder / "bin"
    pip = [*_PIP, "--python", str(programs / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if path]
    (packages / "dependencies.pth").write_text("\n".join(others))
    return programs
