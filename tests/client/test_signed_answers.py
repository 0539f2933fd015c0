"""With a shared secret an answer that is invented, changed, or of another request is never taken for a reward."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from http_application import Application, application
from reward_client import AsyncRewardClient, RewardClient
from reward_client.errors import BadAnswer, InvalidArgument
from reward_client.signatures import NONCE_HEADER, SIGNATURE_HEADER, item_digest, new_nonce, signature_of
from serving import serving

from service.api_keys import read_answer_key
from service.engines.oracle import oracle_reward_of_text
from service.errors import SettingsError

SECRET = "0123456789abcdef" * 4
EXPECTED = [oracle_reward_of_text("a ", "b"), oracle_reward_of_text("c ", "d")]

Change = Callable[[bytes, dict[str, str]], tuple[bytes, dict[str, str]]]


@contextmanager
def proxy(upstream: str, change: Change) -> Iterator[str]:
    """A proxy that changes what comes back."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            names = ("Content-Type", NONCE_HEADER)
            headers = {name: self.headers[name] for name in names if name in self.headers}
            answer = httpx2.post(upstream + self.path, content=body, headers=headers)
            kept = {"X-Model-Version": "1", SIGNATURE_HEADER: answer.headers.get(SIGNATURE_HEADER, "")}
            content, sent = change(answer.content, kept)
            self.send_response(answer.status_code)
            for name, value in (sent | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def signing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("signing")
    (folder / "answer.key").write_text(SECRET + "\n")
    options = ("--engine", "oracle", "--security.answer_key", str(folder / "answer.key"))
    with serving(folder, *options, runtime="local") as server:
        yield server.url


def swapped(content: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    answer = json.loads(content)
    first, second = answer["results"]
    first["reward"], second["reward"] = second["reward"], first["reward"]
    return json.dumps(answer).encode(), headers


def unsigned(content: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
    return content, {name: value for name, value in headers.items() if name != SIGNATURE_HEADER}


class Replay:
    """Answers every request with the first answer."""

    def __init__(self) -> None:
        self.first: tuple[bytes, dict[str, str]] | None = None

    def __call__(self, content: bytes, headers: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        self.first = self.first or (content, headers)
        return self.first


def test_signed_answers_are_taken(signing_server: str) -> None:
    """Client and service with one secret score as before, compare as before, and unchecked clients as before."""
    with RewardClient(signing_server, answer_key=SECRET) as client, RewardClient(signing_server) as unchecked:
        assert client.score(["a ", "c "], ["b", "d"]) == EXPECTED
        assert client.compare("a ", ["b", "d"]).rewards[0] == EXPECTED[0]
        assert (
            client.score(["a ", "c "], ["b", "d"], diagnostics="basic")[0].diagnostics.keys()
            == unchecked.score(["a ", "c "], ["b", "d"], diagnostics="basic")[0].diagnostics.keys()
        )


@pytest.mark.parametrize("change", [swapped, unsigned], ids=["swapped", "unsigned"])
def test_a_changed_answer_is_refused(signing_server: str, change: Change) -> None:
    """Swapped rewards, which nothing else would show, and an answer without its signature are refused at once."""
    with proxy(signing_server, change) as url, RewardClient(url, answer_key=SECRET, deadline_s=30) as client:
        with pytest.raises(BadAnswer, match="signature"):
            client.score(["a ", "c "], ["b", "d"])
        with RewardClient(url) as unchecked:
            assert unchecked.score(["a ", "c "], ["b", "d"]) in (EXPECTED, EXPECTED[::-1])


def test_the_answer_to_another_request_is_refused(signing_server: str) -> None:
    """A signed answer is good for one request only, also where the same items are sent again."""
    with proxy(signing_server, Replay()) as url, RewardClient(url, answer_key=SECRET, deadline_s=30) as client:
        assert client.score(["a ", "c "], ["b", "d"]) == EXPECTED
        with pytest.raises(BadAnswer, match="the signature of another answer or request"):
            client.score(["a ", "c "], ["b", "d"])


def test_another_secret_is_refused(signing_server: str) -> None:
    """A server that does not know the secret cannot answer for the service."""
    client = RewardClient(signing_server, answer_key=SECRET[::-1], deadline_s=30)
    with client, pytest.raises(BadAnswer, match="signature"):
        client.score(["a "], ["b"])


@pytest.fixture
async def app(tmp_path: Path) -> Any:
    (tmp_path / "answer.key").write_text(SECRET)
    async with application(tmp_path, security={"answer_key": str(tmp_path / "answer.key")}) as running:
        yield running


async def test_digests_name_the_items(app: Application) -> None:
    """Each result has the digest of its item as it stands in the body, and the signature covers both bodies."""
    items = [b'{"text": "a", "id":7}', b'{"prompt":"\xc3\xa4 ","completion":"b"}']
    body = b'{"digests":true, "items":[ ' + b" , ".join(items) + b" ]}"
    nonce = new_nonce()

    answer = await app.post("/v1/score", body, **{NONCE_HEADER: nonce})

    assert [result["digest"] for result in answer.json()["results"]] == list(map(item_digest, items))
    assert answer.headers[SIGNATURE_HEADER] == signature_of(SECRET.encode(), nonce, body, answer.content)
    assert "digest" not in (await app.post("/v1/score", {"items": [{"text": "a"}]})).json()["results"][0]


async def test_a_malformed_number_is_refused(app: Application) -> None:
    """A nonce that anybody could guess is an error, and so is any where the service has no secret."""
    refused = await app.post("/v1/score", {"items": [{"text": "a"}]}, **{NONCE_HEADER: "short"})
    assert refused.json()["code"] == "invalid_request"


async def test_without_a_secret_nothing_is_signed(tmp_path: Path) -> None:
    """A client that wants signatures is told so; it never gets an answer that looks as if it were checked."""
    async with application(tmp_path) as running:
        refused = await running.post("/v1/score", {"items": [{"text": "a"}]}, **{NONCE_HEADER: new_nonce()})
    assert refused.status_code == 422
    assert "security.answer_key" in refused.json()["detail"]


def test_secrets_are_long(tmp_path: Path) -> None:
    """Neither side takes a secret that can be guessed; the file may end with a line break."""
    file = tmp_path / "answer.key"
    file.write_text("short\n")
    with pytest.raises(SettingsError, match="has 5 characters; a secret has at least 32"):
        read_answer_key(str(file))
    with pytest.raises(SettingsError, match="cannot be read"):
        read_answer_key(str(tmp_path / "missing"))
    file.write_text(SECRET + "\n")
    assert read_answer_key(str(file)) == SECRET.encode()
    with pytest.raises(InvalidArgument, match="at least 32 characters"):
        AsyncRewardClient("http://127.0.0.1:1", answer_key="short")
    assert asyncio.iscoroutinefunction(AsyncRewardClient.score)
