"""Texts with role markers become the conversations that they were written from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.data.transcripts import is_open_transcript, is_transcript, read_transcript
from service.records import Message

MARKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
contents = st.text(max_size=40).filter(lambda text: "\n\nHuman:" not in "\n\n" + text and "Assistant:" not in text)


@given(st.lists(contents, min_size=2, max_size=6))
def test_writing_and_reading_are_inverse(texts: list[str]) -> None:
    """Also for contents with spaces and line ends at their edges."""
    messages = tuple(Message(role, text) for text, role in zip(texts, ["user", "assistant"] * 3, strict=False))
    # Line ends at the end of a turn are part of it, unless they would move the next marker.
    transcript = "".join(MARKERS[message.role] + message.text for message in messages)

    assert is_transcript(transcript)
    assert read_transcript(transcript) == messages


@pytest.mark.parametrize("text", ["Human: Hi", "\n\nAssistant: Hello", "See:\n\nHuman: Hi\n\nAssistant: Hello", ""])
def test_other_texts_are_no_transcripts(text: str) -> None:
    """A transcript begins with a human turn and has an assistant turn."""
    assert not is_transcript(text)


def test_an_open_transcript_ends_with_an_assistant_marker() -> None:
    """With or without the space after it."""
    assert is_open_transcript("\n\nHuman: Hi\n\nAssistant:")
    assert is_open_transcript("Human: Hi\n\nAssistant: ")
    assert not is_open_transcript("\n\nHuman: Hi\n\nAssistant: Hello")
