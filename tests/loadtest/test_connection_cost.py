"""New connections are measured against persistent ones, and a refused connection ends the measurement."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from misbehaving_server import CountingServer, Request, ok, running
from serving import free_port

from loadtest.connections import main


class Counting(CountingServer):
    """Rewards are lengths of texts."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok({"rewards": [float(len(query)) for query in request.body["query"]]})


def test_each_item_has_a_connection_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 items twice: each pass of the one way opens 4 connections that stay, of the other 12 more; the file has both.

    As the passes open their connections at first together, 4 of which are then not used, there are 4 for each pass.
    """
    found = tmp_path / "found.json"
    with running(Counting()) as server:
        arguments = ["--url", server.url, "--in-flight", "4", "--requests", "12", "--rounds", "2", "--json", str(found)]
        status = main(arguments)

    passes = json.loads(found.read_text())
    assert status == 0
    assert [one["reuse"] for one in passes] == [True, False, False, True]
    assert all(one["items_per_s"] > 0 for one in passes)
    assert server.connections == 4 * 5 + 12 * 2
    assert "of the throughput" in capsys.readouterr().out


def test_a_refused_connection_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a server there is a sentence and status 1, and no figure."""
    status = main(["--url", f"http://127.0.0.1:{free_port()}", "--requests", "4"])

    assert status == 1
    assert "refused" in capsys.readouterr().err
