"""Draws the layers of the service, from the import contract, and the path of a request through them.

``python docs/architecture_diagram.py`` rewrites the Mermaid block of ``docs/architecture.md``; a test checks that the
block is current.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- diagram: made by docs/architecture_diagram.py -->", "<!-- end of diagram -->"

PATH = (
    ("caller", "http", "body"),
    ("http", "protocols", "bytes"),
    ("protocols", "scorer", "ScoreRequest"),
    ("scorer", "tokenization", "items"),
    ("scorer", "scheduling", "TokenSequences"),
    ("scheduling", "engine_loop", "batch"),
    ("engine_loop", "pipeline", "batch"),
    ("pipeline", "engines", "token ids"),
    ("engines", "pipeline", "rewards, states"),
    ("pipeline", "diagnostics", "states, texts"),
    ("scorer", "protocols", "scores"),
    ("protocols", "http", "answer"),
)
"""The steps of a request: from, to, and what is handed over."""


def read_layers(pyproject: str) -> list[list[str]]:
    """Return the layers of the service as the import contract lists them, from the top; each one's modules.

    Raises:
        StopIteration: there is no layers contract for the service.
    """
    contracts = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    contract = next(one for one in contracts if one.get("containers") == ["service"])
    return [[module.strip() for module in layer.split("|")] for layer in contract["layers"]]


def draw(layers: Sequence[Sequence[str]]) -> str:
    """Return a Mermaid flowchart: one box per layer, imports point down, numbered arrows for the path of a request.

    Raises:
        ValueError: a step names a module that the contract does not have.
    """
    known = {"caller", *(module for layer in layers for module in layer)}
    unknown = {module for step in PATH for module in step[:2]} - known
    if unknown:
        raise ValueError(f"The import contract does not list {', '.join(sorted(unknown))}")
    lines = ["flowchart TB", "  caller([caller])"]
    for number, layer in enumerate(layers):
        lines.append(f'  subgraph layer{number}[" "]')
        lines += [f"    {module}" for module in layer]
        lines.append("  end")
    lines += [f"  layer{number} ~~~ layer{number + 1}" for number in range(len(layers) - 1)]
    lines += [f'  {begin} -->|"{number}. {what}"| {end}' for number, (begin, end, what) in enumerate(PATH, start=1)]
    return "\n".join(["```mermaid", *lines, "```"])


def replace_diagram(page: str, diagram: str) -> str:
    """Return the page with the diagram between its markers.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("The page has no markers for the diagram")
    return f"{before}{BEGIN}\n\n{diagram}\n\n{END}{after}"


def main() -> None:
    """Rewrite the diagram of the page."""
    diagram = draw(read_layers((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    PAGE.write_text(replace_diagram(PAGE.read_text(encoding="utf-8"), diagram), encoding="utf-8")


if __name__ == "__main__":
    main()
