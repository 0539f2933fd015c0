"""The cost of diagnostics: the same items scored at every level in one run, and the ratios of their times.

python -m loadtest.diagnostics_cost DATA [--model DIR] [--turns 30]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from service.arguments import CommandParser, not_empty, whole_number
from service.checkpoints.hub import check_source
from service.commands import run_command
from service.data.reading import read_examples
from service.errors import DatasetError
from service.records import DEMO_MODEL, Item


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cost of the levels of diagnostics; returns the exit status."""
    return run_command("python -m loadtest.diagnostics_cost", "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    if options.model not in {None, DEMO_MODEL}:
        check_source(options.model)
    items = _read_items(options.data)

    from loadtest.level_cost import run

    return run(items, model=options.model, threads=options.threads, num_turns=options.turns)


def _read_items(path: Path) -> list[Item]:
    items = [Item(exchange) for _, parsed in read_examples(path) for exchange in parsed.exchanges()]
    if not items:
        raise DatasetError(f"{path} has no row.")
    return items


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m loadtest.diagnostics_cost", description=main.__doc__)
    parser.add_argument("data", type=Path, help="items or pairs")
    parser.add_argument("--model", type=not_empty, metavar="DIR", help="checkpoint folder; default: the demo model")
    parser.add_argument("--turns", type=whole_number(1), default=30)
    parser.add_argument("--threads", type=whole_number(1), help="of the forward pass; default: all cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
