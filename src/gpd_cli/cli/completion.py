"""Scripts with which shells complete the names of commands and options."""

from __future__ import annotations

from argparse import Action
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from gpd_cli.cli.help import HELP_GROUPS
from gpd_cli.cli.parser import Parser
from gpd_cli.cli.resume import RESUME
from gpd_cli.cli.standalone import extract_parser, report_parser
from gpd_cli.cli.suggestions import data_options
from gpd_cli.errors import GpdError
from gpd_cli.recipes.names import recipe_names

Shell = Literal["bash", "zsh"]
HELP = """\
usage: gpd completion bash|zsh

Print a script by which the shell completes commands and options.

  mkdir -p ~/.local/share/bash-completion/completions
  gpd completion bash > ~/.local/share/bash-completion/completions/gpd
  gpd completion zsh > ~/.gpd-completion   # to be sourced in ~/.zshrc
"""
# One function serves both shells, since zsh can run completions for bash. Words that do not begin
# with a hyphen are completed as files, except for the two commands that take a name.
_FUNCTION = """\
_gpd() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if (( COMP_CWORD == 1 )); then
    words="{commands} --help --version"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=()
  if [[ $COMP_CWORD == 1 || $current == -* || " recipes completion " == *" ${{COMP_WORDS[1]}} "* ]]
  then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  fi
}}
complete -o default -F _gpd gpd
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def print_completion(shells: Sequence[str], parsers: Mapping[str, Parser]) -> None:
    """Print the completion script for a shell, or the help if it is asked for.

    Args:
        shells: the command line after the command; it should be the name of one shell.
        parsers: parsers of LightningCLI's subcommands, by name.

    Raises:
        GpdError: when the shell is not supported, or not exactly one shell is named.
    """
    if any(shell in ("-h", "--help") for shell in shells):
        print(HELP, end="")
        return
    if len(shells) != 1:
        raise GpdError("Name one shell: gpd completion bash, or gpd completion zsh.")
    options = {name: _long(parser._actions) for name, parser in parsers.items()}
    # `expand` also accepts options of `fit` that it does not need; only those in its help count.
    options["expand"] = _long(parsers["expand"].shown())
    options["extract"] = _long(extract_parser()._actions)
    options["report"] = _long(report_parser()._actions)
    options["recipes"] = sorted(recipe_names())
    options["completion"] = list(get_args(Shell))
    for name in ("fit", "validate", "test", "predict"):
        options[name] += [*data_options(), *HELP_GROUPS]
    options["fit"].append(RESUME)
    print(completion_script(shells[0], options), end="")


def completion_script(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """The text of the completion script for a shell.

    Args:
        shell: bash or zsh.
        options: for each command, by name, the words that may follow it: options with their
            hyphens, or names.

    Raises:
        GpdError: when the shell is another one.
    """
    if shell not in get_args(Shell):
        shells = " or ".join(get_args(Shell))
        raise GpdError(f"There is no completion for '{shell}'; choose {shells}.")
    cases = "\n".join(
        f'      {name}) words="{" ".join(opts)}" ;;' for name, opts in options.items()
    )
    script = _FUNCTION.format(commands=" ".join(options), cases=cases)
    return (_ZSH if shell == "zsh" else "") + script


def _long(actions: Sequence[Action]) -> list[str]:
    names = [name for action in actions for name in action.option_strings]
    return [name for name in names if name.startswith("--") and not name.endswith("+")]
