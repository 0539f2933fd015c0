"""Rows of every accepted form become prompt and completions, and an invalid row is named without its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.data.prompts import PromptCompletions, normalized_opening, parse_completions, parse_pair
from service.data.rows import Row
from service.errors import DatasetError, UnusableRow
from service.records import Message

CANARY = "canary-4c1d"
PROMPT = [{"role": "user", "content": "Why?"}]
GOOD, POOR = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]
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
        {"prompt": "Why?", "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, POOR], "messages": [*PROMPT, GOOD]},
        {"prompt": PROMPT, "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, POOR]},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No.", "response": " No."},
        {"prompt": "\n\nHuman: Why?\n\nAssistant: ", "chosen": "Because.", "rejected": "No."},
        {
            "prompt": "\n\nHuman: Why?\n\nAssistant:",
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
        },
        {"prompt": PARTS, "chosen": "Because.", "rejected": "No."},
        {"chosen": json.dumps([*PROMPT, GOOD]), "rejected": json.dumps([*PROMPT, POOR])},
        {"prompt": str(PROMPT), "chosen": str([GOOD]), "rejected": str([POOR])},
    ],
    ids=["strings", "explicit-prompt", "implicit-prompt", "parquet-nulls", "ultrafeedback", "whole-conversations",
         "hh", "hh-prompt", "hh-prompt-with-space", "hh-whole", "content-parts", "json-text", "python-text"],
)  # fmt: skip
def test_all_forms_of_a_pair_are_the_same_pair(values: dict[str, Any]) -> None:
    """The formats of TRL, UltraFeedback, Skywork and HH and plain strings give the same texts, from either function."""
    assert parse_pair(row(**values)) == parse_completions(row(**values)) == PAIR


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": PROMPT, "completion": "Because."},
        {"prompt": PROMPT, "response": "Because."},
        {"prompt": PROMPT, "completion": [GOOD]},
        {"prompt": PROMPT, "completion": "Because.", "chosen": None, "rejected": None},
        {"messages": [*PROMPT, GOOD]},
        {"messages": [*PROMPT, GOOD], "prompt": "Why?"},
        {"completion": [*PROMPT, GOOD]},
        {"completion": "\n\nHuman: Why?\n\nAssistant: Because."},
    ],
    ids=[
        "completion",
        "response",
        "assistant-message",
        "parquet-nulls",
        "messages",
        "messages-and-prompt",
        "whole",
        "hh",
    ],
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
        ({"prompt": CANARY, "chosen": CANARY}, "is not a pair"),
        ({"chosen": CANARY, "rejected": "No."}, 'has no "prompt"'),
        ({"chosen": [GOOD], "rejected": [POOR]}, 'has no "prompt"'),
        (
            {"prompt": PROMPT, "chosen": [*PROMPT, GOOD], "rejected": "No."},
            '"chosen" is a conversation, but "rejected"',
        ),
        ({"prompt": CANARY, "chosen": [], "rejected": []}, '"chosen" must be a string or a list of messages'),
        ({"prompt": CANARY, "chosen": f"[{{'role': {CANARY}", "rejected": "No."}, "written as text, but not as JSON"),
    ],
    ids=["no-rejected", "only-strings", "no-prompt", "two-kinds", "no-messages", "cut-off"],
)
def test_an_invalid_pair_is_named_and_not_shown(values: dict[str, Any], message: str) -> None:
    """The error names file, row and rule, never the text."""
    with pytest.raises(DatasetError, match=message) as caught:
        parse_pair(row(**values))

    assert "rows, row 1" in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"chosen": [*PROMPT, GOOD, *PROMPT, GOOD], "rejected": [*PROMPT, POOR, *PROMPT, POOR]}, "differ before their"),
        ({"chosen": [*PROMPT, *PROMPT], "rejected": [*PROMPT, POOR]}, "the last message is not an assistant's"),
        ({"prompt": CANARY, "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, POOR]}, "does not contain the prompt"),
        ({"prompt": [GOOD], "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, POOR]}, "does not contain the prompt"),
        ({"prompt": CANARY, "chosen": None, "rejected": CANARY}, '"chosen" has no value'),
        ({"chosen": f"{CANARY} x", "rejected": f"{CANARY} x"}, "the texts are identical and there is no prompt"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": CANARY, "rejected": "No."}, "content .* is null"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "chosen": CANARY, "rejected": "No."},
            "a part of a message's content is not text",
        ),
        (
            {"messages": [*PROMPT, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, GOOD]},
            "a message has tool calls of another form",
        ),
        (
            {"messages": [*PROMPT, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "a message has a function call",
        ),
        ({"prompt": f"{CANARY}\ud83d", "chosen": CANARY, "rejected": "No."}, "not valid Unicode"),
    ],
    ids=["early-difference", "user-last", "other-prompt", "other-messages", "null", "tie", "null-content", "image",
         "tool-calls", "function-call", "half-a-surrogate-pair"],
)  # fmt: skip
def test_a_row_without_a_usable_pair_has_a_reason(values: dict[str, Any], reason: str) -> None:
    """Such a row can be left out and counted: its error has the location and a reason, never the text."""
    with pytest.raises(UnusableRow, match=reason) as caught:
        parse_completions(row(**values))

    assert caught.value.location == "rows, row 1"
    assert CANARY not in str(caught.value)


def test_plain_texts_without_a_prompt_begin_with_it() -> None:
    """TRL's standard format with an implicit prompt: the split is at a word, and prompt and completion are the text."""
    pair = parse_pair(row(chosen="Q: Why?\nA: Because it is.", rejected="Q: Why?\nA: Because it was."))

    assert pair.prompt == "Q: Why?\nA: Because it"
    assert pair.completions == (" is.", " was.")


def test_a_completion_that_looks_like_a_transcript_is_a_completion() -> None:
    """Beside a prompt that it does not contain, a text with role markers is what the model wrote."""
    text = "\n\nHuman: Other\n\nAssistant: Yes."

    assert parse_pair(row(prompt="Why?", chosen=text, rejected="No.")).completions == (text, "No.")


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


def test_conversations_with_tools_are_split_before_their_last_message() -> None:
    """Calls and results in whole conversations are part of the prompt; a last message that calls is a completion."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    before = [*PROMPT, call, {"role": "tool", "content": "4"}]
    tools = [{"type": "function", "function": {"name": "add"}}]

    pair = parse_pair(row(chosen=[*before, GOOD], rejected=[*before, call], tools=tools))

    assert not isinstance(pair.prompt, str)
    assert [turn.role for turn in pair.prompt] == ["user", "assistant", "tool"]
    chosen, rejected = pair.completions
    assert chosen == "Because."
    assert not isinstance(rejected, str)
    assert rejected == (pair.prompt[1],)
    assert json.loads(pair.tools) == tools


def test_a_lone_surrogate_in_a_call_is_no_text() -> None:
    """What tokenizers cannot read is found in all fields of a message and in tools."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "\ud83d"}}]}

    with pytest.raises(UnusableRow, match="not valid Unicode"):
        parse_completions(row(prompt=PROMPT, completion=[call]))
    with pytest.raises(UnusableRow, match="not valid Unicode"):
        parse_completions(row(prompt=PROMPT, completion="x", tools=[{"name": "\ud83d"}]))
