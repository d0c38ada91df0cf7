"""The command `gpd`, also `python -m gpd_cli`.

Help and version are shown at once: nothing slow is imported before the command is known.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HELP = """\
usage: gpd [-h] [--version] COMMAND ...

Gap Preserving Distillation: train small image classifiers better than they can be trained alone.

commands:
  fit       train a student together with a dynamic teacher grown out of it
  validate  score student and dynamic teacher of a checkpoint on the validation images
  test      score them on the test images
  predict   write their predictions for images, with or without labels
  expand    inflate a student into a dynamic teacher that computes the same function
  extract   cut the trained student out of a checkpoint, for deployment
  recipes   list the configurations that come with gpd

  gpd COMMAND --help lists a command's options (gpd COMMAND --print_config its whole configuration).

examples:
  gpd fit -c recipe:digits
  gpd fit -c recipe:digits --ckpt_path runs/digits/version_0/checkpoints/last.ckpt
  gpd expand --model.student resnet18 --model.ratio 2 --model.branches 6 --output wide.safetensors
  gpd extract --ckpt_path best.ckpt --output student.safetensors

GPD_DEBUG=1 shows the full traceback of an error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit code: 0, 1 for an error that is reported in one sentence, 2 for a wrong command
        line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"gpd {_version()}")
        return 0
    if arguments[0] == "recipes":
        return _recipes(arguments[1:])
    # Huge pages for tensors on the CPU: a training step allocates every kernel and gradient anew,
    # and would otherwise spend much of its time on page faults. Torch reads this variable once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Users' classes lie in the working directory, which Python searches for `python -m` only.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        from gpd_cli.cli.command_line import run
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        return _fail(
            "torch and torchvision do not fit together (operator torchvision::nms does not exist); "
            "install both in one step into a fresh environment: pip install torch torchvision."
        )
    return run(arguments)


def _recipes(arguments: list[str]) -> int:
    from gpd_cli.errors import GpdError
    from gpd_cli.recipes.listing import recipes_command

    try:
        recipes_command(arguments)
    except GpdError as error:
        return _fail(str(error))
    return 0


def _version() -> str:
    try:
        return version("gpd-cli")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _fail(message: str) -> int:
    print(f"gpd: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
