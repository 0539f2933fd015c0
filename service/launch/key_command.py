"""The command ``reward-key``: makes an API key, prints it once, and appends its hash to a file of keys."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.arguments import CommandParser
from service.errors import OutputError, SettingsError
from service.records import KEY_NAME_PATTERN, KEY_SCOPES

if TYPE_CHECKING:
    from service.api_keys import ApiKey

OWNER_ONLY = 0o600


def command_parser() -> CommandParser:
    """Return the parser of ``reward-key``."""
    parser = CommandParser(
        prog="reward-key",
        description="Make an API key. The key is printed on standard output and stored nowhere; the file gets its "
        "hash. A running service reads the file at its next start.",
    )
    parser.add_argument("name", help="name of the key, for logs")
    parser.add_argument("--file", required=True, help="file of keys; it is made if it does not exist")
    group = parser.add_argument_group("what the key may do")
    group.add_argument(
        "--scope", choices=KEY_SCOPES, default="score", help="score: score and read the model; admin: also metrics "
        "and the monitors of all runs (default: score)",
    )  # fmt: skip
    group.add_argument(
        "--items-per-minute", type=_positive, metavar="N", help="quota of items; beyond it requests get 429"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    Raises:
        StartupError: the file cannot be read or written, or has an entry of that name.
    """
    parser = command_parser()
    options = parser.parse_args(arguments)
    if not re.fullmatch(KEY_NAME_PATTERN, options.name):
        parser.error("a name has 1 to 64 of A-Z a-z 0-9 _ . - and begins with a letter or digit")

    from service.api_keys import ApiKey, hash_of, new_key

    key = new_key()
    entry = ApiKey(
        name=options.name, scope=options.scope, sha256=hash_of(key), items_per_minute=options.items_per_minute
    )
    append_entry(Path(options.file).expanduser(), entry)
    print(key)
    return 0


def append_entry(file: Path, entry: ApiKey) -> None:
    """Append an entry to a file of keys, which only its owner can read if it is made here.

    Raises:
        SettingsError: the file is not a valid file of keys, or has an entry of that name.
        OutputError: it cannot be written.
    """
    from service.api_keys import read_api_keys

    lines = [f"- name: {entry.name}", f"  scope: {entry.scope}", f"  sha256: {entry.sha256}"]
    if entry.items_per_minute is not None:
        lines.append(f"  items_per_minute: {entry.items_per_minute}")
    try:
        content = file.read_text(encoding="utf-8") if file.exists() else ""
        if content.strip():
            names = read_api_keys(str(file)).names
            if entry.name in names:
                raise SettingsError(f"{file} has a key named {entry.name}: remove it, or take another name.")
        separator = "" if not content or content.endswith("\n") else "\n"
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, OWNER_ONLY)
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(separator + "\n".join(lines) + "\n")
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({(error.strerror or str(error)).lower()}).") from None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
