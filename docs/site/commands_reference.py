"""The reference of commands, from their parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from types import MappingProxyType

from docs.site.markdown import page, table
from service.arguments import CommandParser
from service.commands import EXTRAS

_ORDER = (
    "reward-serve",
    "reward-score",
    "reward-train",
    "reward-audit",
    "reward-calibrate",
    "reward-convert",
    "reward-export",
    "reward-key",
    "reward-loadtest",
    "reward-completion",
)
_SHARED = frozenset({"help", "version"})
_STATUSES = MappingProxyType({"reward-calibrate": "3 when a false-alarm rate is out of tolerance, "})


def commands_reference() -> str:
    """Return the page.

    Raises:
        KeyError: a command of ``[project.scripts]`` has no place in the order, or the other way round.
    """
    if set(_ORDER) != set(EXTRAS):
        raise KeyError(f"not in the order of the page: {sorted(set(_ORDER) ^ set(EXTRAS))}")
    introduction = (
        "`--help` of a command prints the same texts; every command has `--version`. The exit status is 0 after "
        "success, 1 after one sentence on standard error about what a value names, 2 where the command line itself is "
        "wrong, and 130 after Ctrl-C. Results are on standard output, progress on standard error: in colour and "
        "animated on a terminal, as plain lines elsewhere (`NO_COLOR` is respected). Options are never abbreviated.\n\n"
        "`reward-completion bash`, `zsh` or `fish` prints a script with which the shell completes all of them; "
        "`reward-completion --help` says where to put it."
    )
    return page("Commands", introduction, *(_section(name) for name in _ORDER))


def _section(name: str) -> str:
    module, extra = EXTRAS[name]
    parser: CommandParser = import_module(module).command_parser()
    status = f" Exit status {_STATUSES[name]}otherwise as above." if name in _STATUSES else ""
    about = f"{parser.description} Needs the extra `{extra}`.{status}"
    usage = "" if name == "reward-serve" else f"```text\n{_usage(parser)}\n```"
    notes = ["Every [setting](settings.md) is an option too, under its full name."] if name == "reward-serve" else []
    return "\n\n".join([f"## {name}", about, *filter(None, [usage]), *notes, *_groups(parser, name)])


def _usage(parser: CommandParser) -> str:
    return (parser.usage or parser.format_usage().removeprefix("usage: ")).strip() % {"prog": parser.prog}


def _groups(parser: CommandParser, name: str) -> Iterator[str]:
    for group in parser._action_groups:  # noqa: SLF001 - argparse has no other door to its groups
        actions = [action for action in group._group_actions if _is_shown(action, name)]  # noqa: SLF001
        if actions:
            title = {"options": "Options", "positional arguments": "Arguments"}.get(group.title or "", group.title)
            rows = [(_names(action), _values(action), _meaning(parser, action)) for action in actions]
            yield f"**{title}**\n\n{table(('option', 'value', 'meaning'), rows)}"


def _is_shown(action: argparse.Action, name: str) -> bool:
    """Whether an option has a row; of the options of settings only those with a short name have one."""
    if action.dest in _SHARED or action.help is argparse.SUPPRESS:
        return False
    return name != "reward-serve" or "." not in action.dest or any("." not in one for one in action.option_strings)


def _names(action: argparse.Action) -> str:
    names = action.option_strings or [str(action.metavar or action.dest)]
    return ", ".join(f"`{name}`" for name in names)


def _values(action: argparse.Action) -> str:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) or not action.option_strings:
        return ""
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    metavar = action.metavar or action.dest.rpartition(".")[2].upper()
    text = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    return f"`{text} ...`" if action.nargs in {"+", "*"} else f"`{text}`"


def _meaning(parser: CommandParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action)  # noqa: SLF001 - defaults are filled in there
    return text.partition(" [env:")[0]
