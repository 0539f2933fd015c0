"""The request log: whole lines, no texts, and never a reason to wait."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from service.http import access_log as journal
from service.http.access_log import Journal

CANARY = "canary-90be"


def test_lines_are_whole(tmp_path: Path) -> None:
    """Each fact arrives as JSON on a line of its own; facts that are None stay out."""
    log = Journal(str(tmp_path / "log"))

    for number in range(100):
        log.write("scored", number=number, code=None)
    log.close()

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(100))
    assert all(set(line) == {"time", "event", "number"} for line in lines)


def test_restart_appends(tmp_path: Path) -> None:
    """A log that is opened again goes on where it was."""
    for name in ("first", "second"):
        log = Journal(str(tmp_path / "log"))
        log.write(name)
        log.close()
        log.close()

    assert [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()] == ["first", "second"]


def test_bug_without_its_message(tmp_path: Path) -> None:
    """Of an unexpected exception the log has class and place; its message may quote a user."""
    log = Journal(str(tmp_path / "log"))
    with pytest.raises(ValueError, match=CANARY) as caught:
        raise ValueError(CANARY)
    log.write_bug(caught.value, request_id="r")
    log.close()

    text = (tmp_path / "log").read_text()
    assert json.loads(text)["exception"] == "ValueError"
    assert "test_access_log.py" in text
    assert CANARY not in text


def test_reader_that_stands_still(tmp_path: Path) -> None:
    """When nobody takes the lines, writing and closing do not wait, and what does not fit is dropped."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = Journal(str(pipe))

    def write_lines() -> None:
        for _ in range(30_000):
            log.write("scored", text="x" * 1000)

    writing = threading.Thread(target=write_lines)
    writing.start()
    writing.join(20.0)

    assert not writing.is_alive()
    assert log.num_waiting == journal.MAX_WAITING_LINES
    begin = time.monotonic()
    log.close()
    assert time.monotonic() - begin < 3 * journal.CLOSE_S
    os.close(reader)
