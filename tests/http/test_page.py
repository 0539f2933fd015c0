"""The page for a browser: its files, its headers, who may read them, and that it can be switched off."""

from __future__ import annotations

import re
import tomllib
from collections.abc import AsyncIterator
from dataclasses import fields
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import pytest
from http_application import Application, application
from starlette.types import Receive, Scope, Send

from service.api_keys import ApiKey, ApiKeys, hash_of
from service.diagnostics.detectors import ONE_SIDED_TESTS
from service.diagnostics.monitors.alarms import SIGNALS
from service.diagnostics.ood import COMPONENTS
from service.edits.offered import OFFERED
from service.edits.phrases import WORDINGS
from service.http.access_log import AccessLog
from service.http.open_requests import OpenRequests
from service.http.page_routes import FILES, FOLDER
from service.http.starting import create_starting_app

KEYS = ApiKeys([ApiKey(name="trainer", sha256=hash_of("key"))])
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[Application]:
    async with application(tmp_path) as started:
        yield started


class Links(HTMLParser):
    """What a page loads, and what would run or style without a file of its own."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inline: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = {"script": "src", "link": "href", "img": "src"}.get(tag)
        if loads:
            self.loaded.append(given.get(loads) or "")
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        self.inline += ["style"] if tag == "style" else []


def test_the_folder_has_the_served_files_alone() -> None:
    """Every file of the folder has a path, and is in the wheel, which the image installs."""
    names = {path.name for path in FOLDER.iterdir()}
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]

    assert names == set(FILES.values())
    assert all(any(fnmatch(f"http/page/{name}", pattern) for pattern in packaged) for name in names)


def test_files_load_each_other_and_nothing_else() -> None:
    """The page loads its own files, by relative links that exist; nothing is inline, no address is remote."""
    links = Links((FOLDER / "index.html").read_text())

    assert {f"/{link}" for link in links.loaded} <= set(FILES)
    assert len(links.loaded) == 3
    assert links.inline == []
    for name in FILES.values():
        content = (FOLDER / name).read_text()
        imported = re.findall(r'from "\./([^"]+)"', content)
        assert set(imported) <= set(FILES.values()), name
        remote = set(re.findall(r"https?://[^\s\"'`)]+", content)) - {"http://www.w3.org/2000/svg"}
        assert not remote, name


def test_the_buttons_are_the_edits_that_the_service_offers() -> None:
    """The page names the edits of ``/v1/edit``, in their order, and has no phrase of them of its own."""
    script = (FOLDER / "completion.js").read_text()
    table = re.search(r"const EDITS = \{\n(.*?)\n\};", script, re.DOTALL)
    assert table is not None

    assert re.findall(r"^ +(\w+): ", table[1], re.MULTILINE) == list(OFFERED)
    phrases = [phrase for wording in WORDINGS for field in fields(wording) for phrase in getattr(wording, field.name)]
    sentences = [phrase for phrase in phrases if len(phrase.split()) > 3]
    assert len(sentences) > 100
    scripts = "".join((FOLDER / name).read_text() for name in FILES.values())
    assert not [sentence for sentence in sentences if sentence.strip() in scripts]


def test_reasons_have_words() -> None:
    """The page has words for every component and every text test that can be the reason of a p-value."""
    script = (FOLDER / "reasons.js").read_text()
    named = set(re.findall(r"^ +(\w+): \"", script, re.MULTILINE))

    assert {name for name, _ in ONE_SIDED_TESTS} <= named
    assert {*COMPONENTS, "group", "nonfinite"} - {"text"} <= named


def test_signals_have_words() -> None:
    """The page has words for every signal of drift."""
    script = (FOLDER / "alarms.js").read_text()

    assert all(re.search(rf"^ +{name}: \"", script, re.MULTILINE) for name in SIGNALS)


@pytest.mark.parametrize(
    "word",
    ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Storage", "cookie", "indexedDB"],
)
def test_scripts_neither_make_markup_of_text_nor_store_anything(word: str) -> None:
    """No script has a way to turn text into markup or code, or to store the key of a reader."""
    assert not [name for name in FILES.values() if name.endswith(".js") and word in (FOLDER / name).read_text()]


async def test_files_are_served_under_a_strict_policy(app: Application) -> None:
    """Each file has its media type and a policy without inline code, foreign hosts, frames and text as markup."""
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path, name in FILES.items():
        answer = await app.client.get(path)
        assert answer.status_code == 200, path
        assert answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["Content-Type"].split(";")[0] == types[Path(name).suffix]
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert not re.search(r"unsafe|\*|https?:|data:", policy)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_known_version_is_not_sent_again(app: Application) -> None:
    """A browser that has a file asks for it by its tag and gets 304; another tag gets the file."""
    tag = (await app.client.get("/page/main.js")).headers["ETag"]

    known = await app.client.get("/page/main.js", headers={"If-None-Match": tag})
    other = await app.client.get("/page/main.js", headers={"If-None-Match": '"0"'})

    assert (known.status_code, known.content) == (304, b"")
    assert other.status_code == 200


async def test_the_page_can_be_switched_off(tmp_path: Path) -> None:
    """With page.enabled false no file has a route, and the rest is as before."""
    async with application(tmp_path, page={"enabled": False}) as app:
        assert {(await app.client.get(path)).status_code for path in FILES} == {404}
        assert (await app.client.get("/v1/model")).status_code == 200


@pytest.mark.parametrize(("enabled", "status"), [(True, 200), (False, 401)])
async def test_only_the_files_need_no_key(tmp_path: Path, enabled: bool, status: int) -> None:
    """With API keys the files, which hold no data, are open while the page is on; the figures need a key."""
    async with application(tmp_path, api_keys=KEYS, page={"enabled": enabled}) as app:
        assert {(await app.client.get(path)).status_code for path in FILES} == {status}
        assert (await app.client.get("/page/other.js")).status_code == 401
        for path in ("/v1/model", "/v1/monitor", "/metrics"):
            assert (await app.client.get(path)).status_code == 401
        bodies: dict[str, Any] = {
            "/v1/style": {"texts": []},
            "/v1/edit": {"edit": "pad", "completion": "a"},
            "/v1/compare": {"prompt": "p", "completions": ["a", "b"]},
        }
        for path, body in bodies.items():
            assert (await app.post(path, body)).status_code == 401
            assert (await app.post(path, body, Authorization="Bearer key")).status_code == 200


async def test_links_are_relative_to_a_route_prefix(app: Application) -> None:
    """Behind a route prefix, which Ray Serve passes as root_path, the page is at the prefix and loads from there."""
    inner: Any = app.client._transport

    async def prefixed(scope: Scope, receive: Receive, send: Send) -> None:
        await inner.app({**scope, "root_path": "/helpful"}, receive, send)

    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(prefixed), base_url="http://app") as client:
        for path in ("/helpful", "/helpful/"):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert '<base href="/helpful/">' in answer.text
        assert (await client.get("/helpful/page/main.js")).status_code == 200


@pytest.mark.parametrize(("page", "status"), [(True, 200), (False, 404)])
async def test_the_page_is_there_while_the_model_loads(tmp_path: Path, page: bool, status: int) -> None:
    """Before the model is loaded the page can be opened, and what it asks for is not ready."""
    log = AccessLog(str(tmp_path / "log"))
    starting = create_starting_app(log, OpenRequests(), page=page)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(starting), base_url="http://app") as client:
        assert (await client.get("/")).status_code == status
        assert (await client.get("/v1/model")).json()["code"] == "not_ready"
    log.close()
