"""``POST /v1/edit``: a completion with one of the edits that the service offers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from http_application import Application, application

from service.edits.offered import OFFERED, EditName, edited


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Application]:
    async with application(tmp_path, limits={"max_item_chars": 2000}) as started:
        yield started


@pytest.mark.parametrize("name", OFFERED)
async def test_an_edit_is_that_of_the_library(app: Application, name: EditName) -> None:
    """The answer is the text that the edit of this name makes."""
    answer = await app.post("/v1/edit", {"edit": name, "completion": "Boil it. Then cool it."})

    assert answer.status_code == 200
    assert answer.json() == {"completion": edited(name, "Boil it. Then cool it.")}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"edit": "pad", "completion": "a" * 2001}, 413, "item_too_long"),
        ({"edit": "improve", "completion": "a"}, 422, "invalid_request"),
        ({"edit": "pad"}, 422, "invalid_request"),
        ({"edit": "pad", "completion": ["a"]}, 422, "invalid_request"),
        (b"{", 400, "malformed_body"),
    ],
)
async def test_bad_requests_are_refused(app: Application, body: object, status: int, code: str) -> None:
    """A completion over the limit, an unknown edit, a missing field and broken JSON each have their error."""
    answer = await app.post("/v1/edit", body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
