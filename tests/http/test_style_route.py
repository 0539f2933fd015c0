"""``POST /v1/style``: the marks of a text are those that the style block of its score counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from http_application import Application, application

TEXTS = [
    "# Title\n- **one**\n- two\nPerhaps it depends. Great question! \u2728",
    "word by word by word by word by word by word",
    "",
]
KINDS = ("headers", "list_items", "bold", "emoji", "hedges", "flattery")


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Application]:
    async with application(tmp_path, limits={"max_item_chars": 2000, "max_compare_completions": 8}) as started:
        yield started


async def test_spans_agree_with_the_style_block(app: Application) -> None:
    """Of each kind a text has as many spans as its style block counts, and a repetition where repeat4 is not zero."""
    items = [{"prompt": "p", "completion": text} for text in TEXTS]
    scored = (await app.post("/v1/score", {"items": items, "diagnostics": "full"})).json()["results"]

    spans = (await app.post("/v1/style", {"texts": TEXTS})).json()["spans"]

    for text, result, found in zip(TEXTS, scored, spans, strict=True):
        style = result["style"]
        counts = Counter(span["kind"] for span in found)
        assert {kind: counts[kind] for kind in KINDS} == {kind: style[kind] for kind in KINDS}
        assert bool(counts["repetition"]) == (style["repeat4"] > 0)
        assert all(0 <= span["start"] < span["end"] <= len(text) for span in found)
    assert [span for span in spans[0] if span["kind"] == "flattery"] == [
        {"kind": "flattery", "start": TEXTS[0].index("Great"), "end": TEXTS[0].index("!")}
    ]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"texts": ["a"] * 9}, 413, "too_many_items"),
        ({"texts": ["a" * 1500, "b" * 501]}, 413, "item_too_long"),
        ({"texts": "a"}, 422, "invalid_request"),
        ({"items": []}, 422, "invalid_request"),
        (b"{", 400, "malformed_body"),
    ],
)
async def test_texts_are_bounded(app: Application, body: object, status: int, code: str) -> None:
    """More texts, or more characters together, than the limits allow are refused with one sentence."""
    answer = await app.post("/v1/style", body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
