"""Wire formats: the request for each kind of server, and what counts as a reward in its response."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.wire import NATIVE, UnexpectedAnswer, VllmWire, WireFormat

ITEMS = [{"prompt": "one", "completion": " two"}, {"prompt": "three", "completion": " four"}]
NO_TEMPLATE = SimpleNamespace(chat_template=None)


class Templated:
    """A tokenizer with a chat template."""

    chat_template = "any"

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


def test_the_native_format_sends_prompt_and_completion_unchanged() -> None:
    """The service renders the items itself."""
    assert json.loads(NATIVE.body(ITEMS)) == {"items": ITEMS}


@pytest.mark.parametrize(
    ("tokenizer", "texts", "adds_special_tokens"),
    [
        (NO_TEMPLATE, ["one two", "three four"], True),
        (Templated(), ["<user>one<assistant> two", "<user>three<assistant> four"], False),
    ],
    ids=["joined", "chat-template"],
)
def test_vllm_gets_rendered_texts_and_returns_raw_logits(
    tokenizer: object, texts: list[str], adds_special_tokens: bool
) -> None:
    """Texts are rendered by the chat template, and no activation is requested."""
    assert json.loads(VllmWire(tokenizer).body(ITEMS)) == {
        "input": texts,
        "use_activation": False,
        "add_special_tokens": adds_special_tokens,
    }


@pytest.mark.parametrize(
    ("wire", "answer"),
    [
        (NATIVE, {"results": [{"reward": 0.5}, {"reward": -1.0}]}),
        (VllmWire(NO_TEMPLATE), {"data": [{"index": 1, "probs": [-1.0]}, {"index": 0, "probs": [0.5]}]}),
    ],
    ids=["native", "vllm"],
)
def test_rewards_are_read_in_the_order_of_the_items(wire: WireFormat, answer: dict[str, Any]) -> None:
    """Each format assigns rewards to items in its own way."""
    assert wire.rewards(json.dumps(answer).encode()) == [0.5, -1.0]


@pytest.mark.parametrize(
    ("wire", "answer"),
    [
        (NATIVE, {"results": [{"error": {}}]}),
        (NATIVE, {"results": [{"reward": float("nan")}]}),
        (VllmWire(NO_TEMPLATE), {"data": [{"index": 0, "probs": [float("nan")]}]}),
        (VllmWire(NO_TEMPLATE), {"data": [{"index": 0, "probs": [0.2, 0.8]}]}),
    ],
    ids=["item-error", "native-nan", "vllm-nan", "two-labels"],
)
def test_a_response_without_a_reward_is_refused(wire: WireFormat, answer: dict[str, Any]) -> None:
    """An item error, a NaN and several labels end the measurement."""
    with pytest.raises(UnexpectedAnswer):
        wire.rewards(json.dumps(answer).encode())
