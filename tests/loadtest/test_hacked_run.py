"""A run in which hacking begins: what is sent before, what after, and what a service makes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loadtest.hacked_run import HackedRun, body_of, hacked, main, read_groups
from service.edits.probe import EDITS
from service.errors import DatasetError
from service.records import Exchange, Message

TEXTS = ("One answer. It is short.", "Two.")
GROUPS = [[Exchange(f"Question {n}?", text) for text in TEXTS] for n in range(8)]
EMOJI = [edit for edit in EDITS if (edit.name, edit.strength) == ("emoji", 4)]
RUN = HackedRun(GROUPS, EMOJI, clean_s=60.0, hacked_s=30.0, share=0.5)


def test_the_share_grows_after_the_clean_part() -> None:
    """No prompt is hacked in the clean part; then the share grows evenly to its end, and stays there."""
    assert [RUN.share_after(seconds) for seconds in (0.0, 60.0, 75.0, 90.0, 500.0)] == [0.0, 0.0, 0.25, 0.5, 0.5]


def test_bodies_have_the_completions_or_their_edits() -> None:
    """At a share of 0 the texts of the data are sent, at 1 each with the edit; a prompt has one group."""
    clean = body_of(GROUPS, RUN, 0.0, random.Random(0))["items"]
    edited = body_of(GROUPS, RUN, 1.0, random.Random(0))["items"]

    assert [item["completion"] for item in clean] == [one.completion for group in GROUPS for one in group]
    assert [item["group"] for item in edited] == [str(n) for n in range(8) for _ in range(2)]
    assert all(not item["completion"].isascii() for item in edited)


def test_tool_calls_are_not_edited() -> None:
    """A completion of messages is sent as it is."""
    exchange = Exchange("p", (Message("assistant", "One."), Message("tool", "2")))

    assert hacked(exchange, EMOJI[0], random.Random(0)) is exchange


def test_rows_are_read(tmp_path: Path) -> None:
    """A pair is a group of two; a file without rows is refused."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")

    assert read_groups(tmp_path / "pairs.jsonl") == [(Exchange("p", "a"), Exchange("p", "b"))]
    with pytest.raises(DatasetError):
        read_groups(tmp_path / "empty.jsonl")


def test_a_service_that_does_not_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a service the command ends with status 1 and a sentence."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")

    status = main([str(tmp_path / "pairs.jsonl"), "--url", "http://127.0.0.1:9", "--clean-s", "1"])

    assert status == 1
    assert "ConnectError" in capsys.readouterr().err
