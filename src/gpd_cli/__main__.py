"""The command `gpd`, also `python -m gpd_cli`.

Help and version are shown at once: nothing slow is imported before a command is to do something.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpd_cli.cli.cpu_memory import use_huge_pages
from gpd_cli.cli.stored_help import stored_help
from gpd_cli.package_version import gpd_version

HELP = """\
usage: gpd [-h] [--version] COMMAND ...

Gap Preserving Distillation: train small image classifiers with a teacher that
is grown out of them.

commands:
  fit       train a student together with a dynamic teacher grown out of it
  validate  score student and dynamic teacher on the validation images
  test      score student and dynamic teacher on the test images
  predict   write both networks' predictions for images, labelled or not
  expand    inflate a student into a dynamic teacher with the same function
  extract   cut the trained student out of a checkpoint, for deployment
  report    write a page about one run or several: curves, classes, pictures
  recipes   list the configurations that come with gpd

  gpd COMMAND --help lists a command's options, gpd fit --help-trainer those of
  Lightning's Trainer, and gpd fit --print_config prints the whole
  configuration. gpd completion bash (or zsh) prints a script that completes
  commands and options.

examples:
  gpd fit -c recipe:digits
  gpd fit --resume runs/digits/version_0
  gpd test --ckpt_path runs/digits/version_0/checkpoints/best.ckpt
  gpd extract --ckpt_path best.ckpt --output student.safetensors
  gpd expand --model.student resnet18 --output wide.safetensors
  gpd report runs/digits/version_0 runs/digits/version_1

GPD_DEBUG=1 shows the full traceback of an error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit code: 0 for success, 2 after a mistake in the command line, 3 when training
        diverged, 128 plus its number after a signal, and 1 after any other error.
    """
    _open_streams()
    try:
        code = _command(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has left, as `head` does; Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"gpd {gpd_version()}")
        return 0
    if arguments[0] == "recipes":
        return _recipes(arguments[1:])
    if (page := stored_help(arguments)) is not None:
        print(page, end="")
        return 0
    use_huge_pages()
    # Users' classes lie in the working directory, which Python searches for `python -m` only.
    try:
        here = str(Path.cwd())
    except OSError:
        return _fail(
            "The working directory no longer exists or cannot be read; change to another directory."
        )
    if here not in sys.path:
        sys.path.append(here)
    try:
        with _quiet_interrupt(), _without_collector():
            from gpd_cli.cli.command_line import run
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        return _fail(
            "torch and torchvision do not match (operator torchvision::nms does not exist); "
            "install both in one step into a fresh environment: pip install torch torchvision."
        )
    return run(arguments)


def _open_streams() -> None:
    """Open standard streams that a shell has closed (``>&-``), on the null device.

    Otherwise the next opened file would get the number of a closed stream, and printed text would
    end up in that file. Characters that standard output cannot encode are escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is free
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(opened, "r" if number == 0 else "w", closefd=False))
    # Characters that the terminal's encoding lacks must not end the command; standard error escapes
    # them by default.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _recipes(arguments: list[str]) -> int:
    from gpd_cli.errors import GpdError
    from gpd_cli.recipes.listing import recipes_command

    try:
        recipes_command(arguments)
    except GpdError as error:
        return _fail(str(error))
    return 0


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process as a signal does, without the traceback of an import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Import without the garbage collector, and let it pass over what was imported from then on.

    Modules, classes and functions stay until the process ends. To look through all of them again
    and again, while they are imported, in each later collection and at the end, takes a second.
    """
    if not gc.isenabled() or "lightning" in sys.modules:  # as in a program that calls `main`
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _fail(message: str) -> int:
    print(f"gpd: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
