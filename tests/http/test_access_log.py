"""The access log: complete lines, no user text, and no waiting for the file."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from http_application import application

from service.http import access_log
from service.http.access_log import AccessLog

CANARY = "canary-90be"


def test_lines_are_complete(tmp_path: Path) -> None:
    """Each call writes one line of JSON; facts that are None are left out."""
    log = AccessLog(str(tmp_path / "log"))

    for number in range(100):
        log.write("scored", number=number, code=None)
    log.close()

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(100))
    assert all(set(line) == {"time", "event", "number"} for line in lines)


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "0af7651916cd43dd8448eb211c80319c"),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
        (f"00-{CANARY}", None),
    ],
)
async def test_the_trace_of_a_request_is_logged(tmp_path: Path, traceparent: str, trace_id: str | None) -> None:
    """The line has the trace id of a valid traceparent, and nothing of any other."""
    async with application(tmp_path) as running:
        await running.post("/v1/score", {"items": [{"text": "a"}]}, traceparent=traceparent)

    text = (tmp_path / "requests.jsonl").read_text()
    assert json.loads(text.splitlines()[-1]).get("trace_id") == trace_id
    assert CANARY not in text


def test_restart_appends(tmp_path: Path) -> None:
    """A log that is opened again is appended to."""
    for name in ("first", "second"):
        log = AccessLog(str(tmp_path / "log"))
        log.write(name)
        log.close()
        log.close()

    assert [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()] == ["first", "second"]


def test_exception_is_logged_without_its_message(tmp_path: Path) -> None:
    """The log has the class and the frames of an unexpected exception, and not its message, which may quote a user."""
    log = AccessLog(str(tmp_path / "log"))
    with pytest.raises(ValueError, match=CANARY) as caught:
        raise ValueError(CANARY)
    log.write_exception(caught.value, request_id="r")
    log.close()

    text = (tmp_path / "log").read_text()
    assert json.loads(text)["exception"] == "ValueError"
    assert "test_access_log.py" in text
    assert CANARY not in text


def test_blocked_reader(tmp_path: Path) -> None:
    """When nothing reads the pipe, writing and closing do not wait, and lines that do not fit are dropped."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(pipe))

    def write_lines() -> None:
        for _ in range(30_000):
            log.write("scored", text="x" * 1000)

    writing = threading.Thread(target=write_lines)
    writing.start()
    writing.join(20.0)

    assert not writing.is_alive()
    assert log.num_queued == access_log.MAX_QUEUED_LINES
    begin = time.monotonic()
    log.close()
    assert time.monotonic() - begin < 3 * access_log.CLOSE_S
    os.close(reader)
