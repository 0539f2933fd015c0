"""Draws the layers of the service, from the import contract, and the steps of a request through them.

``python docs/architecture_diagram.py`` writes ``docs/images/architecture.svg``; a test checks that it is current.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

STEPS = (
    ("http", "the body is read under a limit of bytes"),
    ("protocols", "the body is decoded into a ScoreRequest"),
    ("scorer", "the request is admitted or refused"),
    ("tokenization", "items become token sequences, in threads"),
    ("scheduling", "sequences wait; a batch is selected by token budget"),
    ("engine_loop", "the engine thread dispatches the batch"),
    ("pipeline", "failures are isolated, rewards checked"),
    ("engines", "one forward pass: rewards and tapped states"),
    ("diagnostics", "length, style and OOD statistics are added"),
    ("protocols", "scores and item errors are encoded"),
    ("http", "headers, access log, metrics"),
)
"""The module that each step of a request runs in, and what happens there."""

ROW, BOX_HEIGHT, CHAR, PAD, GAP = 50, 30, 7.6, 13, 10
LEFT, LEGEND, WIDTH = 20, 640, 1020
STYLE = (
    "text{font:13px ui-sans-serif,system-ui,Helvetica,Arial,sans-serif;fill:#1f2933}"
    ".layer{fill:#f1f5f4}.box{fill:#fff;stroke:#94a3b8}.step{fill:#0f766e}.number{fill:#fff;font-weight:700;font-size:11px}"
    ".note{fill:#52606d;font-size:12px}"
)


def read_layers(pyproject: str) -> list[list[str]]:
    """Return the layers of the service as the import contract lists them, from the top; each one's modules.

    Raises:
        StopIteration: there is no layers contract for the service.
    """
    contracts = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    contract = next(one for one in contracts if one.get("containers") == ["service"])
    return [[module.strip() for module in layer.split("|")] for layer in contract["layers"]]


def draw(layers: Sequence[Sequence[str]]) -> str:
    """Return an SVG: one row per layer, imports point down; numbers mark the steps of a request.

    Raises:
        ValueError: a step names a module that the contract does not have.
    """
    unknown = {module for module, _ in STEPS} - {module for layer in layers for module in layer}
    if unknown:
        raise ValueError(f"The import contract does not list {', '.join(sorted(unknown))}")
    height = 60 + ROW * len(layers)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Layers of the service and the steps of a request</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text class="note" x="{LEFT}" y="24">Layers: a module imports from the rows below it only</text>',
        f'<text class="note" x="{LEGEND}" y="24">Steps of a request</text>',
        *_rows(layers, _steps_by_module()),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _steps_by_module() -> Mapping[str, list[int]]:
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, (module, _) in enumerate(STEPS, start=1):
        numbers[module].append(number)
    return numbers


def _rows(layers: Sequence[Sequence[str]], steps: Mapping[str, list[int]]) -> Iterator[str]:
    for row, layer in enumerate(layers):
        top = 40 + ROW * row
        yield f'<rect class="layer" x="{LEFT}" y="{top}" width="{LEGEND - LEFT - 30}" height="{ROW - 8}" rx="6"/>'
        left: float = LEFT + GAP
        for module in layer:
            width = 2 * PAD + CHAR * len(module)
            yield f'<rect class="box" x="{left}" y="{top + 6}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="5"/>'
            yield f'<text x="{left + PAD}" y="{top + 26}">{escape(module)}</text>'
            left += width + GAP
            for number in steps.get(module, []):
                yield from _badge(left + 6, top + 21, number)
                left += 24


def _legend() -> Iterator[str]:
    for number, (module, what) in enumerate(STEPS, start=1):
        top = 56 + 34 * (number - 1)
        yield from _badge(LEGEND + 10, top, number)
        yield f'<text x="{LEGEND + 28}" y="{top + 4}">{escape(module)}</text>'
        yield f'<text class="note" x="{LEGEND + 28}" y="{top + 19}">{escape(what)}</text>'


def _badge(x: float, y: float, number: int) -> Iterator[str]:
    yield f'<circle class="step" cx="{x:.0f}" cy="{y}" r="10"/>'
    yield f'<text class="number" x="{x:.0f}" y="{y + 4}" text-anchor="middle">{number}</text>'


def main() -> None:
    """Write the picture."""
    layers = read_layers((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    PICTURE.write_text(draw(layers), encoding="utf-8")


if __name__ == "__main__":
    main()
