"""Writes what the demo model answers into README.md and the quickstart: ``python -m docs.demo_figures``.

It starts the demo model, or asks a service that runs already (``--url``). The numbers of the documented answers are
replaced, with as many digits as they have; everything else of the pages stays.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from loadtest.servers import running_service
from service.arguments import CommandParser
from service.commands import run_command
from service.errors import CalibrationError
from service.protocols.native_answers import win_probabilities

NAME = "python -m docs.demo_figures"
ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
PROMPT = "How do I boil an egg?"
COMPLETIONS = ("Put it in boiling water for eight minutes.", "No.")
HACK = {
    "honest": "Put it in boiling water for eight minutes. Then cool it under cold water, so that it peels easily.",
    "hacked": "Boil the egg. " * 40,
}
TIMEOUT_S = 120.0

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FIELDS = ("reward", "reward_percentile", "reward_length_adjusted", "length_percentile")
PLACES: Mapping[str, str] = {
    "version": r'"name": "demo", "version": "([0-9a-f]+)"',
    **{
        f"{field} of {index}": rf'"index": {index}, [^`\[]*?"{field}": {_NUMBER}'
        for index in range(2)
        for field in _FIELDS
    },
    "printed 0": rf"^\[{_NUMBER}, -?[\d.]+\]$",
    "printed 1": rf"^\[-?[\d.]+, {_NUMBER}\]$",
    "preferred": rf"the first is preferred with probability {_NUMBER}",
    **{f"{name} reward": rf"^{name}: reward {_NUMBER}" for name in HACK},
    **{f"{name} p-value": rf"^{name}: reward [^,]*, p-value {_NUMBER}" for name in HACK},
}
"""Where each figure stands in the pages, as the group of a pattern; a page has some of them."""


def measure(url: str) -> dict[str, Any]:
    """Ask a service for what the pages show.

    Returns:
        The figures, by the names of `PLACES`.

    Raises:
        CalibrationError: the service has no calibration for its model.
        httpx2.HTTPError: the service does not answer, or refuses.
    """
    with httpx2.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        answer = _score(client, COMPLETIONS, "basic")
        both = _score(client, tuple(HACK.values()), "full")["results"]
    if any(result["ood"] is None for result in both):
        raise CalibrationError("the service uses no calibration (its log says why), so there is no p-value to write")
    first, second = answer["results"]
    figures: dict[str, Any] = {"version": answer["model"]["version"]}
    for index, result in enumerate((first, second)):
        figures |= {f"{field} of {index}": (result | result["length"])[field] for field in _FIELDS}
        figures[f"printed {index}"] = result["reward"]
    figures["preferred"] = win_probabilities([first["reward"], second["reward"]])[0][1]
    for name, result in zip(HACK, both, strict=True):
        figures |= {f"{name} reward": result["reward"], f"{name} p-value": result["ood"]["p_value"]}
    return figures


def shown(page: str) -> dict[str, str]:
    """Return the figures that a page shows, as it writes them; the first of each."""
    found = {name: re.search(pattern, page, re.MULTILINE) for name, pattern in PLACES.items()}
    return {name: match[1] for name, match in found.items() if match is not None}


def replaced(page: str, figures: Mapping[str, Any]) -> str:
    """Return a page with figures in their places, each number with as many digits as there were."""
    for name, pattern in PLACES.items():
        page = re.sub(pattern, partial(_with, figure=figures[name]), page, flags=re.MULTILINE)
    return page


def _with(match: re.Match[str], figure: Any) -> str:
    digits = len(match[1].partition(".")[2])
    text = f"{figure:.{digits}f}" if isinstance(figure, float) else str(figure)
    start, end = match.start(1) - match.start(), match.end(1) - match.start()
    return match[0][:start] + text + match[0][end:]


def _score(client: httpx2.Client, completions: Sequence[str], diagnostics: str) -> dict[str, Any]:
    items = [{"prompt": PROMPT, "completion": completion} for completion in completions]
    answer = client.post("/v1/score", json={"items": items, "diagnostics": diagnostics})
    body: dict[str, Any] = answer.raise_for_status().json()
    return body


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(NAME, "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = CommandParser(prog=NAME, description="Write the demo model's answers into README.md and the quickstart.")
    parser.add_argument("--url", help="a service that runs already; without it the demo model is started")
    options: argparse.Namespace = parser.parse(arguments)
    with ExitStack() as stack:
        url = options.url
        if url is None:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(running_service(Path("demo"), "auto", logs, "--runtime", "local"))
            url = server.url
        figures = measure(url)
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = replaced(before, figures)
        path.write_text(after, encoding="utf-8")
        now = shown(after)
        for name, figure in shown(before).items():
            print(f"{path.relative_to(ROOT)}: {name}: {figure} -> {now[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
