"""The help of commands: grouped by what the options are for, in colour on a terminal and nowhere else."""

from __future__ import annotations

import io
import re
from importlib import import_module

import pytest

from service.arguments import CommandParser
from service.commands import EXTRAS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def help_of(file: io.StringIO) -> str:
    parser = CommandParser(prog="reward-example", description="Do something.")
    parser.add_argument_group("the result").add_argument("--out", metavar="FILE", help="where it goes: a file")
    parser.print_help(file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal with colours, whatever the tests run in."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_help_is_coloured_on_a_terminal() -> None:
    """Headings are bold and options coloured; without the colours the text is that of a file, letter by letter."""
    coloured = help_of(Terminal())

    assert "\x1b[1mthe result\x1b[0m:" in coloured
    assert "\x1b[36m  --out FILE\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == help_of(io.StringIO())


def test_help_in_a_file_has_no_colours() -> None:
    """A pipe gets plain text."""
    assert "\x1b" not in help_of(io.StringIO())


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """NO_COLOR and a terminal without colours are respected."""
    monkeypatch.setenv(name, value)

    assert "\x1b" not in help_of(Terminal())


@pytest.mark.parametrize("command", EXTRAS)
def test_options_are_grouped_by_what_they_are_for(command: str) -> None:
    """A command with many options has them in groups; beside help and version few are in none."""
    parser: CommandParser = import_module(EXTRAS[command][0]).command_parser()
    groups = {group.title: group._group_actions for group in parser._action_groups if group._group_actions}
    num_options = sum(map(len, groups.values()))

    assert all(action.help for actions in groups.values() for action in actions)
    assert num_options < 8 or len(groups) >= 4
    assert len(groups["options"]) <= (8 if command == "reward-serve" else 4)
