"""The command ``reward-completion``: prints what a shell needs to complete the options of all commands.

The scripts are made by shtab from the parsers themselves, once; a shell that has read them starts no Python to complete
an option.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from service.arguments import CommandParser
from service.commands import EXTRAS

SHELLS = ("bash", "zsh", "fish")

_HOW_TO = """\
bash:  reward-completion bash > ~/.reward-completion.bash
       echo 'source ~/.reward-completion.bash' >> ~/.bashrc
zsh:   reward-completion zsh > ~/.reward-completion.zsh
       echo 'eval "$(cat ~/.reward-completion.zsh)"' >> ~/.zshrc     # after compinit
fish:  reward-completion fish > ~/.config/fish/conf.d/reward-completion.fish
"""
_FOLDERS = {"DIR", "FOLDER", "OUT", "DIR PAIRS", "INPUT", "OUTPUT", "SOURCE"}
_FILES = {"FILE", "DATA"}


def command_parser() -> CommandParser:
    """Return the parser of ``reward-completion``."""
    parser = CommandParser(
        prog="reward-completion",
        description="Print a script with which a shell completes the options of all reward-* commands.",
        epilog=_HOW_TO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = command_parser().parse(arguments)
    print("\n".join(scripts(options.shell)))
    return 0


def scripts(shell: str) -> Iterator[str]:
    """Yield the script of each command.

    Args:
        shell: one of `SHELLS`.
    """
    import shtab

    for module, _ in EXTRAS.values():
        parser: CommandParser = import_module(module).command_parser()
        for action in parser._actions:  # noqa: SLF001 - shtab reads them from there too, and has no other door
            if action.type is Path or action.metavar in _FILES | _FOLDERS or action.dest in {"file", "check"}:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # the attribute is shtab's
        yield shtab.complete(parser, shell)
