"""Rows of every accepted form become prompt and completions, and an invalid row is named without its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.data.prompts import PromptCompletions, normalized_opening, parse_completions, parse_pair
from service.data.rows import Row
from service.errors import DatasetError
from service.records import Message

CANARY = "canary-4c1d"
PROMPT = [{"role": "user", "content": "Why?"}]
GOOD, POOR = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
MESSAGES = (Message("user", "Why?"),)
PAIR = PromptCompletions(MESSAGES, ("Because.", "No."))


def row(**values: Any) -> Row:
    return Row(values, Path("rows"), 1)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": PROMPT, "chosen": "Because.", "rejected": "No."},
        {"prompt": PROMPT, "chosen": [GOOD], "rejected": [POOR]},
        {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, POOR]},
        {"prompt": PROMPT, "chosen": "Because.", "rejected": "No.", "completion": None, "response": None},
    ],
    ids=["strings", "explicit-prompt", "implicit-prompt", "parquet-nulls"],
)
def test_all_forms_of_a_pair_are_the_same_pair(values: dict[str, Any]) -> None:
    """TRL's conversational forms and plain strings give the same texts, from either function."""
    assert parse_pair(row(**values)) == parse_completions(row(**values)) == PAIR


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": PROMPT, "completion": "Because."},
        {"prompt": PROMPT, "response": "Because."},
        {"prompt": PROMPT, "completion": [GOOD]},
        {"prompt": PROMPT, "completion": "Because.", "chosen": None, "rejected": None},
    ],
    ids=["completion", "response", "assistant-message", "parquet-nulls"],
)
def test_a_row_may_have_one_completion(values: dict[str, Any]) -> None:
    """Under either key, as a string or as one assistant message."""
    assert parse_completions(row(**values)) == PromptCompletions(MESSAGES, ("Because.",))


def test_a_prompt_may_be_a_string() -> None:
    """A plain prompt is used as it is."""
    assert parse_completions(row(prompt="Why?", completion="x")).prompt == "Why?"


def test_an_implicit_prompt_has_all_common_messages() -> None:
    """It is everything before the last message, not just the first message."""
    earlier = [*PROMPT, POOR, {"role": "user", "content": "Why not?"}]

    pair = parse_pair(row(chosen=[*earlier, GOOD], rejected=[*earlier, POOR]))

    assert pair.prompt == (Message("user", "Why?"), Message("assistant", "No."), Message("user", "Why not?"))
    assert pair.completions == ("Because.", "No.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": CANARY}, "has neither"),
        ({"prompt": CANARY, "chosen": CANARY}, "has neither"),
        ({"prompt": CANARY, "completion": 1}, '"completion" must be a string'),
        ({"prompt": [], "completion": CANARY}, '"prompt" must be a string or a list of messages'),
        ({"prompt": [CANARY], "completion": CANARY}, '"prompt" must be a string or a list of messages'),
        ({"prompt": [{"role": "user"}], "completion": CANARY}, "has a message that cannot be read"),
        ({"completion": CANARY}, '"prompt" must be a string or a list of messages'),
    ],
    ids=["no-completion", "no-rejected", "number", "no-messages", "strings", "no-content", "no-prompt"],
)
def test_an_invalid_row_is_named_and_not_shown(values: dict[str, Any], message: str) -> None:
    """The error names file, row and rule, never the text."""
    with pytest.raises(DatasetError, match=message) as caught:
        parse_completions(row(**values))

    assert "rows, row 1" in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chosen": CANARY, "rejected": CANARY}, 'has no "prompt"'),
        ({"chosen": [GOOD], "rejected": [POOR]}, "must have the same messages except for the last"),
        ({"chosen": [*PROMPT, GOOD, *PROMPT, GOOD], "rejected": [*PROMPT, POOR, *PROMPT, POOR]}, "the same messages"),
        ({"chosen": [*PROMPT, *PROMPT], "rejected": [*PROMPT, POOR]}, "an assistant's"),
        (
            {"prompt": PROMPT, "chosen": [*PROMPT, GOOD], "rejected": "No."},
            '"chosen" must be a string, or messages that begin with an assistant',
        ),
    ],
    ids=["only-strings", "no-prompt", "early-difference", "user-message", "two-messages"],
)
def test_an_invalid_pair_is_named_and_not_shown(values: dict[str, Any], message: str) -> None:
    """The error names file, row and rule, never the text."""
    with pytest.raises(DatasetError, match=message) as caught:
        parse_pair(row(**values))

    assert "rows, row 1" in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    ["  How do\nI SORT apples?", (Message("system", "Be brief."), Message("user", "how do I sort apples?"))],
    ids=["string", "conversation"],
)
def test_an_opening_is_the_first_user_message_without_case_and_spacing(prompt: str | tuple[Message, ...]) -> None:
    """Two prompts with the same opening are on the same side of every split."""
    assert normalized_opening(prompt) == "how do i sort apples?"


def test_messages_of_agents_keep_their_fields() -> None:
    """Tool calls, tool results and tools are read; fields that a data set pads with null count as absent."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "1", "tool_call_id": "c", "tool_calls": None},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]

    parsed = parse_completions(row(prompt=PROMPT, completion=turns, tools=json.dumps(tools)))

    (completion,) = parsed.completions
    assert isinstance(completion, tuple)
    assert [turn.as_dict() for turn in completion] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    assert json.loads(parsed.tools) == tools
    with pytest.raises(DatasetError, match='"tools" must be'):
        parse_completions(row(prompt=PROMPT, completion="x", tools=[CANARY]))
