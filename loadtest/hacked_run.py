"""Sends a training run in which hacking begins to a service: ``python -m loadtest.hacked_run PAIRS --url URL``.

For a while every completion is as it is in the data. Then a growing share of the prompts has completions with edits
that make no answer better (`service.edits`), as of a policy that learns what a reward model pays for. It shows a person
what the page, the monitors and the dashboard make of that.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx2

from service.arguments import CommandParser, number_between
from service.commands import run_command
from service.data.reading import read_examples
from service.data.rows import dataset_files
from service.edits.edits import Draft, question_of
from service.edits.probe import EDITS, WORDING, Edit
from service.errors import DatasetError
from service.records import Exchange

NAME = "python -m loadtest.hacked_run"
PROMPTS_PER_REQUEST = 8
REQUEST_TIMEOUT_S = 600.0
DEFAULT_EDITS = ("emoji", "praise", "repetition")


@dataclass(frozen=True, slots=True)
class HackedRun:
    """A run to send."""

    groups: Sequence[Sequence[Exchange]] = field(repr=False)
    """Completions of each prompt. They are sent in a random order, as a trainer draws its prompts: files are often
    sorted, and then length or topic drifts without any hacking. When all are through they are sent again."""

    edits: Sequence[Edit]
    clean_s: float
    """Seconds before hacking begins."""

    hacked_s: float
    """Seconds in which the share of hacked prompts grows from 0 to ``share``."""

    share: float
    seed: int = 0

    def share_after(self, elapsed_s: float) -> float:
        """Return the share of hacked prompts so many seconds after the start."""
        return self.share * min(1.0, max(0.0, (elapsed_s - self.clean_s) / self.hacked_s))


def edits_named(names: Sequence[str]) -> list[Edit]:
    """Return the edits of the probe with these names, in every strength."""
    return [edit for edit in EDITS if edit.name in names]


def hacked(exchange: Exchange, edit: Edit, rng: random.Random) -> Exchange:
    """Return an exchange whose completion has the edit; one that is not a text (tool calls) as it is."""
    if not isinstance(exchange.completion, str):
        return exchange
    draft = Draft(exchange.completion, question_of(exchange.prompt))
    return Exchange(exchange.prompt, edit.change(draft, rng, edit.strength, WORDING), exchange.tools)


def body_of(groups: Sequence[Sequence[Exchange]], run: HackedRun, share: float, rng: random.Random) -> dict[str, Any]:
    """Return the body of a request, with this share of its prompts hacked; an edit is drawn for each prompt."""
    items = []
    for number, group in enumerate(groups):
        edit = rng.choice(run.edits) if rng.random() < share else None
        sent = group if edit is None else [hacked(exchange, edit, rng) for exchange in group]
        items += [exchange.as_dict() | {"group": str(number)} for exchange in sent]
    return {"items": items, "diagnostics": "full", "truncation": "prompt_left"}


def send_run(url: str, run_id: str, run: HackedRun, connections: int = 2) -> int:
    """Send a run and return the number of items that were scored.

    Raises:
        httpx2.HTTPError: the service does not answer, or refuses a request.
    """
    started = time.monotonic()
    requests = _requests(run, started)
    lock = threading.Lock()

    def send_all() -> int:
        scored = 0
        headers = {"X-Run-Id": run_id}
        with httpx2.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, headers=headers, trust_env=False) as client:
            while True:
                with lock:
                    body = next(requests, None)
                if body is None:
                    return scored
                answer = client.post("/v1/score", json=body).raise_for_status().json()
                scored += sum("reward" in result for result in answer["results"])

    with ThreadPoolExecutor(connections) as pool:
        return sum(future.result() for future in [pool.submit(send_all) for _ in range(connections)])


def _requests(run: HackedRun, started: float) -> Iterator[dict[str, Any]]:
    rng = random.Random(run.seed)  # noqa: S311 - a choice of texts, not a secret
    groups = cycle(rng.sample(run.groups, len(run.groups)))
    while (elapsed_s := time.monotonic() - started) < run.clean_s + run.hacked_s:
        yield body_of(list(islice(groups, PROMPTS_PER_REQUEST)), run, run.share_after(elapsed_s), rng)


def read_groups(pairs: Path) -> list[Sequence[Exchange]]:
    """Return the completions of each row of a data file.

    Raises:
        DatasetError: the file cannot be read, or has no row that can be used.
    """
    groups: list[Sequence[Exchange]] = [item.exchanges() for _, item in read_examples(pairs)]
    if not groups:
        raise DatasetError(f"{pairs} has no row that can be used.")
    return groups


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(NAME, "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    dataset_files(options.pairs)
    edits = edits_named(options.edits)
    run = HackedRun(read_groups(options.pairs), edits, options.clean_s, options.hacked_s, options.share)
    try:
        scored = send_run(options.url, options.run, run)
    except httpx2.HTTPError as error:
        print(f"{NAME}: {type(error).__name__}: {error}.", file=sys.stderr)
        return 1
    print(f"Scored {scored} items of the run {options.run}; hacking began after {options.clean_s:g} s.")
    return 0 if scored else 1


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=NAME,
        description="Send a training run in which hacking begins to a service.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("pairs", type=Path, help="pairs or completions of prompts, like those of the calibration")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service")
    parser.add_argument("--run", default="ppo-7", help="name of the run")
    parser.add_argument("--clean-s", type=number_between(0.0, 86_400.0), default=120.0, help="seconds before hacking")
    parser.add_argument(
        "--hacked-s", type=number_between(0.1, 86_400.0), default=60.0, help="seconds of growing hacking"
    )
    parser.add_argument(
        "--share", type=number_between(0.0, 1.0), default=0.5, help="share of hacked prompts at the end"
    )
    parser.add_argument(
        "--edits",
        nargs="+",
        choices=sorted({edit.name for edit in EDITS}),
        default=DEFAULT_EDITS,
        help="what it learns",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
