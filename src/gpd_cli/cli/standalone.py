"""The commands that need no Trainer, and so have parsers of their own: `extract` and `report`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gpd_cli.cli.arguments import with_values
from gpd_cli.cli.configurations import YAML, check_configurations, expanded
from gpd_cli.cli.suggestions import suggesting
from gpd_cli.commands.extract import extract_command
from gpd_cli.commands.report import report_command

PARSING: dict[str, Any] = {"parser_mode": YAML, "exit_on_error": False, "allow_abbrev": False}
"""Settings of all parsers of the command line.

Parsers raise their errors, since messages printed by the parsers begin with a page of usage. Names
of options cannot be abbreviated: an abbreviation may become ambiguous with a later version's
options, and configurations do not allow abbreviations either.
"""


def run_extract(arguments: Sequence[str]) -> None:
    """Run the command `extract`.

    Args:
        arguments: the command line after the command. The network needs no options, since its
            architecture and width plan are in the checkpoint.
    """
    config = _parsed(extract_parser(), with_values(arguments))
    del config["config"]
    extract_command(**config)


def run_report(arguments: Sequence[str]) -> None:
    """Run the command `report`.

    Args:
        arguments: the command line after the command; runs are positional arguments.
    """
    report_command(**_parsed(report_parser(), arguments))


def extract_parser() -> ArgumentParser:
    """Make the parser of `extract`."""
    usage = "gpd extract --ckpt_path CKPT_PATH --output OUTPUT [options]"
    parser = ArgumentParser(prog="gpd extract", usage=usage, **PARSING)
    parser.add_argument("-c", "--config", action="config", help="a file with these options (YAML)")
    parser.add_function_arguments(extract_command)
    return parser


def report_parser() -> ArgumentParser:
    """Make the parser of `report`."""
    usage = "gpd report RUN [RUN ...] [options]"
    parser = ArgumentParser(prog="gpd report", usage=usage, **PARSING)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of runs of fit")
    parser.add_function_arguments(report_command, skip={"runs"})
    return parser


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    check_configurations(arguments)
    try:
        return parser.parse_args(expanded(arguments)).as_dict()
    except ArgumentError as error:
        raise suggesting(error, parser, arguments) from error
