"""The command line of ``reward-serve``: one option per setting, made from the settings tree, and a few of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_settings import CliSettingsSource

from service.arguments import CommandParser
from service.launch.start_settings import NULL, SHORT_OPTIONS, StartSettings
from service.setting_fields import allowed_values, setting_field

_METAVARS = {
    "model.path": "DIR",
    "model.revision": "REV",
    "model.device": "DEVICE",
    "model.name": "NAME",
    "diagnostics.calibration": "FILE",
    "log": "FILE",
    "security.api_keys": "FILE",
    "server.tls_certificate": "FILE",
    "server.tls_key": "FILE",
    "server.host": "HOST",
    "server.port": "PORT",
    "code_revision": "REV",
}
_KIND_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_EPILOG = """\
Every setting can also be given in the environment and in the configuration file. Precedence: command line, then
environment, then configuration file, then default. null stands for no value. docs/reference/settings.md has all.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """A parsed command line."""

    settings: CliSettingsSource[Any]
    """The settings that were given as options."""
    config: str | None
    """Path of the configuration file."""
    check: bool
    """Whether the checkpoint is only checked and nothing is served."""
    opens_page: bool
    """Whether a browser is to show the page once the service answers."""


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line.

    Raises:
        SystemExit: ``--help`` or ``--version`` (status 0), or an option that does not exist or lacks its value (2).
    """
    parser, source = _parser_and_source()
    given = parser.parse(parser.with_switches(sys.argv[1:] if arguments is None else arguments))
    values = vars(given)
    empty = [name for name, value in values.items() if value == ""]
    if empty:
        # As from an unset variable of a shell script; the next source, or the demo model, would be taken instead.
        parser.error(f"{SHORT_OPTIONS.get(empty[0], f'--{empty[0]}')} has an empty value")
    config, check, opens_page = values.pop("config"), values.pop("check"), values.pop("open")
    if isinstance(check, str):
        if values.get("model.path", check) != check:
            parser.error("--check and --model name two checkpoints: name one")
        values["model.path"] = check
    if opens_page and check is not None:
        parser.error("--check serves nothing, so there is no page to --open: leave one out")
    return Options(source(parsed_args=values), config, check is not None, opens_page)


def settings_parser() -> CommandParser:
    """Return the parser of ``reward-serve``."""
    return _parser_and_source()[0]


def _parser_and_source() -> tuple[_SettingsParser, CliSettingsSource[Any]]:
    parser = _SettingsParser(
        prog="reward-serve",
        usage="%(prog)s [--model DIR] [--port PORT] [--config FILE] [option ...]",
        description="Serve a scalar-head reward model over HTTP.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with settings, the tree of args in serve_config.yaml"
    )
    parser.add_argument(
        "--check",
        metavar="DIR",
        nargs="?",
        const=True,
        help="check this checkpoint, or the one of --model, and its parity with transformers; serve nothing",
    )
    parser.add_argument("--open", action="store_true", help="show the page in a browser once the service answers")
    source: CliSettingsSource[Any] = CliSettingsSource(
        StartSettings, root_parser=parser, add_argument_method=_add_setting
    )
    return parser, source


def _add_setting(container: Any, *names: str, dest: str, **keywords: Any) -> None:
    """Add the option of one setting under its dotted and its short name; sections as a whole get none."""
    if dest in StartSettings.model_fields and "." not in dest and keywords.get("const") == "{}":
        return
    if "metavar" in keywords:
        kind = keywords["metavar"].replace("{bool,", "{true,false,")
        keywords["metavar"] = _METAVARS.get(dest) or _KIND_METAVARS.get(kind, kind)
    field = setting_field(dest, StartSettings)
    values = f"; {allowed_values(field)}" if field and "number" in allowed_values(field) else ""
    before, mark, after = keywords["help"].replace("(default: None", f"(default: {NULL}").rpartition("(default: ")
    default, end, environment = after.partition(")")
    default = default.lower() if default in {"True", "False"} else default
    keywords["help"] = f"{before}{mark}{default}{values}{end}{environment}"
    short = [SHORT_OPTIONS[dest]] if dest in SHORT_OPTIONS else []
    container.add_argument(*short, *names, dest=dest, **keywords)


class _SettingsParser(CommandParser):
    """Takes ``--switch=true`` beside ``--switch``."""

    stray_values = "an argument has no option in front of it; a checkpoint is given with --model DIR"

    def with_switches(self, arguments: Sequence[str]) -> list[str]:
        """Return the arguments with ``--switch=true``, or false, in the form that argparse takes: ``--no-switch``."""
        switches = {
            option: action
            for action in self._actions
            if isinstance(action, argparse.BooleanOptionalAction)
            for option in action.option_strings
        }
        taken: list[str] = []
        for argument in arguments:
            option, equals, value = argument.partition("=")
            if argument.lower() in _TRUE | _FALSE and taken and taken[-1] in switches:
                option, equals, value = taken.pop(), "=", argument
            if not equals or option not in switches:
                taken.append(argument)
            elif option.startswith("--no-") or value.lower() not in _TRUE | _FALSE:
                self.error(f"{option} is a switch: give it without a value, or give the positive one true or false")
            else:
                taken.append(option if value.lower() in _TRUE else f"--no-{option.removeprefix('--')}")
        return taken
