"""The commands that are no methods of the Trainer: `extract` and `report`."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gpd_cli.cli.arguments import with_values
from gpd_cli.cli.configurations import YAML, check_configurations
from gpd_cli.cli.suggestions import suggesting
from gpd_cli.commands.extract import extract_command
from gpd_cli.commands.report import report_command

PARSING: dict[str, Any] = {"parser_mode": YAML, "exit_on_error": False, "allow_abbrev": False}
"""Of all parsers: they raise, for their own messages begin with a page of usage. The beginning of
an option's name stands for it no more than in a configuration: later versions may have others."""


def run_extract(arguments: Sequence[str]) -> None:
    """Run `extract`: architecture and plan are in the file, there is nothing else to describe."""
    config = _parsed(extract_parser(), with_values(arguments))
    del config["config"]
    extract_command(**config)


def run_report(arguments: Sequence[str]) -> None:
    """Run `report`: its runs need no option's name."""
    report_command(**_parsed(report_parser(), arguments))


def extract_parser() -> ArgumentParser:
    """The options of `extract`."""
    usage = "gpd extract --ckpt_path CKPT_PATH --output OUTPUT [options]"
    parser = ArgumentParser(prog="gpd extract", usage=usage, **PARSING)
    parser.add_argument("-c", "--config", action="config", help="a file with these options (YAML)")
    parser.add_function_arguments(extract_command)
    return parser


def report_parser() -> ArgumentParser:
    """The options of `report`."""
    usage = "gpd report RUN [RUN ...] [options]"
    parser = ArgumentParser(prog="gpd report", usage=usage, **PARSING)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of runs of fit")
    parser.add_function_arguments(report_command, skip={"runs"})
    return parser


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    check_configurations(arguments)
    try:
        return parser.parse_args(list(arguments)).as_dict()
    except ArgumentError as error:
        raise suggesting(error, parser, arguments) from error
