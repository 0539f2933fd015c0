"""The last token of each step is found on token ids, or the item is refused; it is never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pytest
from reward_client.options import TemplateChoice
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

from service.errors import HttpError, InvalidRequest, SequenceTooLong
from service.records import (
    Encoding,
    Exchange,
    Item,
    Message,
    ModelInputs,
    Steps,
    TemplatedText,
    TokenIds,
    TokenSequence,
)
from service.settings import TokenizationSettings
from service.steps import StepMarker, StepReading
from service.tokenization import Tokenization

TEXTS = ("Put it into water.", "Wait.\nThen cool it.", "Done")
PROMPT = "How do I boil an egg?"
EOT = "<|im_end|>"
"""A token of the tiny tokenizer that stands for a marker."""


def tokenization(
    marker: StepMarker = StepMarker(),  # noqa: B008 - frozen
    *,
    template: str = CHAT_TEMPLATE,
    limit: int = 400,
    max_steps: int = 512,
    inputs: ModelInputs = ModelInputs(),  # noqa: B008 - frozen
    **settings: Any,
) -> Tokenization:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = template
    return Tokenization(
        tokenizer,
        TokenizationSettings(**settings),
        max_input_tokens=limit,
        vocab_size=len(tokenizer),
        inputs=inputs,
        step_reading=StepReading(marker, max_steps),
    )


def marker_id() -> int:
    token_id: int = tiny_tokenizer("llama").convert_tokens_to_ids(EOT)
    return token_id


def encoded(scheme: Tokenization, item: Item, **encoding: Any) -> TokenSequence:
    (outcome,) = scheme.encode([item], Encoding(**encoding))
    assert isinstance(outcome, TokenSequence), outcome
    return outcome


def refused(scheme: Tokenization, item: Item, **encoding: Any) -> HttpError:
    (outcome,) = scheme.encode([item], Encoding(**encoding))
    assert isinstance(outcome, HttpError)
    return outcome


def text_up_to(ids: Sequence[int], position: int) -> str:
    text: str = tiny_tokenizer("llama").decode(ids[: position + 1])
    return text


def texts_item(texts: Sequence[str] = TEXTS, prompt: str = PROMPT) -> Item:
    return Item(Exchange(prompt, "\n".join(texts)), steps=Steps("texts", tuple(texts)))


def turns_item(*completions: str) -> Item:
    turns: list[Message] = []
    for completion in completions:
        turns += [Message("assistant", completion), Message("user", "Go on.")]
    return Item(Exchange(PROMPT, tuple(turns[:-1])), steps=Steps("turns"))


@pytest.mark.parametrize("template", get_args(TemplateChoice)[:2])
@pytest.mark.parametrize("marker", [" STEP\n", ".\n\n", "\u043a\u0438"])
def test_steps_end_with_the_marker(marker: str, template: TemplateChoice) -> None:
    """Each position is the last token of the text up to the end of that step and its marker."""
    scheme = tokenization(StepMarker(marker))

    (outcome,) = scheme.encode([texts_item()], Encoding(template=template))

    if isinstance(outcome, InvalidRequest):  # a merge crosses the border, which some texts and markers have
        assert "within a token" in str(outcome)
        return
    assert isinstance(outcome, TokenSequence)
    for index, position in enumerate(outcome.step_positions):
        expected = "".join(text + marker for text in TEXTS[: index + 1])
        assert text_up_to(outcome.token_ids, position).endswith(expected[-20:])
    assert len(outcome.step_positions) == 3


def test_steps_end_at_the_marker_token() -> None:
    """A marker that is one token is found by its id, after the prompt only, also where the prompt has it."""
    scheme = tokenization(StepMarker(EOT, marker_id()), template="{% for m in messages %}{{ m.content }}{% endfor %}")

    sequence = encoded(scheme, texts_item(prompt=f"A{EOT}B"))

    assert [sequence.token_ids[position] for position in sequence.step_positions] == [marker_id()] * 3
    assert text_up_to(sequence.token_ids, sequence.step_positions[0]).endswith(TEXTS[0] + EOT)


def test_a_step_that_contains_the_marker_is_refused() -> None:
    """There are then more markers than steps, and it is unknown which is which."""
    scheme = tokenization(StepMarker(EOT, marker_id()), template="{% for m in messages %}{{ m.content }}{% endfor %}")

    assert "4 markers for 3 steps" in str(refused(scheme, texts_item((f"a{EOT}b", "c", "d"))))


def test_steps_that_are_tokenized_alone() -> None:
    """The ids are those of the prompt, and of each step by itself with the marker's id after it."""
    tokenizer = tiny_tokenizer("llama")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    scheme = tokenization(StepMarker("\n", newline, separate=True))

    sequence = encoded(scheme, texts_item(), template="concat")

    expected, ends = tokenizer(PROMPT)["input_ids"], []
    for text in TEXTS:
        expected = [*expected, *tokenizer(text, add_special_tokens=False)["input_ids"], newline]
        ends.append(len(expected) - 1)
    assert list(sequence.token_ids) == expected
    assert list(sequence.step_positions) == ends
    assert sequence.num_prompt_tokens == len(tokenizer(PROMPT)["input_ids"])


def test_steps_that_are_tokenized_alone_need_the_end_of_the_text() -> None:
    """A template that closes the assistant's turn would stand before them, which is no text of training."""
    newline = tiny_tokenizer("llama")("\n", add_special_tokens=False)["input_ids"][-1]

    error = refused(tokenization(StepMarker("\n", newline, separate=True)), texts_item())

    assert "writes text behind a completion" in str(error)


def test_markers_are_refused_where_the_completion_has_no_known_begin() -> None:
    """Markers of the prompt would be taken for ends of steps."""
    template = (
        "{% for m in messages %}{% if loop.last %}LAST{{ m.content | length }}{% endif %}{{ m.content }}{% endfor %}"
    )
    item = Item(Exchange(f"A{EOT}B", f"one, and two{EOT}"), steps=Steps("marker"))

    error = refused(tokenization(StepMarker(EOT, marker_id()), template=template), item)

    assert "unknown where the completion begins" in str(error)


def test_a_marker_that_the_template_trims_is_refused() -> None:
    """A template that changes the completion leaves the end of its last step unknown."""
    scheme = tokenization(
        StepMarker("\n\n"), template="{% for m in messages %}<|im_start|>{{ m.content | trim }}{% endfor %}"
    )

    assert "changes the completion" in str(refused(scheme, texts_item()))


def test_markers_in_given_token_ids() -> None:
    """Token ids are read at each marker: the model's, or the one that the item names."""
    ids = (5, 7, 6, 7, 8)
    item = Item(TokenIds(ids), steps=Steps("marker", token_id=7))

    assert encoded(tokenization(), item).step_positions == (1, 3)
    assert encoded(tokenization(StepMarker(None, 6)), Item(TokenIds(ids), steps=Steps("marker"))).step_positions == (2,)
    assert "no marker token" in str(refused(tokenization(), Item(TokenIds(ids), steps=Steps("marker", token_id=9))))
    assert "step_token_id" in str(refused(tokenization(), Item(TokenIds(ids), steps=Steps("marker"))))


def test_each_turn_is_read_where_the_conversation_up_to_it_is() -> None:
    """The position of a turn is the last token of the same conversation, cut off after that turn."""
    scheme = tokenization()
    completions = ("First.", "Second answer.", "Third.\n")
    whole = encoded(scheme, turns_item(*completions))

    for count, position in enumerate(whole.step_positions, start=1):
        alone = encoded(scheme, Item(turns_item(*completions[:count]).content))
        assert whole.token_ids[: position + 1] == alone.token_ids
    assert len(whole.step_positions) == 3


def test_a_template_that_renders_earlier_turns_otherwise_is_refused() -> None:
    """Then no position of the whole conversation has the state of the conversation up to a turn."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if loop.last %}LAST{% endif %}\n{{ m.content }}{% endfor %}"
    )

    assert "otherwise once others follow" in str(refused(tokenization(template=template), turns_item("a", "b")))


def test_truncation_moves_the_steps_and_never_drops_one() -> None:
    """Tokens of the prompt are dropped before the steps; a text whose step would be dropped is refused."""
    scheme = tokenization(StepMarker(EOT, marker_id()))
    item = texts_item(prompt="word " * 30)
    whole = encoded(scheme, item, template="concat")
    short = tokenization(StepMarker(EOT, marker_id()), limit=whole.num_tokens - 20)

    cut = encoded(short, item, template="concat", truncation="prompt_left")

    assert cut.num_dropped == 20
    assert [position + 20 for position in cut.step_positions] == list(whole.step_positions)
    templated = Item(TemplatedText(f"a{EOT}" + "word " * 200), steps=Steps("marker"))
    error = refused(short, templated, truncation="prompt_left")
    assert isinstance(error, SequenceTooLong)
    assert "drop a step" in str(error)


def test_the_number_of_steps_is_limited() -> None:
    """Also where the steps are markers or turns, whose number the text decides."""
    scheme = tokenization(StepMarker(EOT, marker_id()), max_steps=2)

    for item in (
        texts_item(),
        turns_item("a", "b", "c"),
        Item(TokenIds((marker_id(),) * 3), steps=Steps("marker")),
    ):
        assert "3 steps; the limit is 2" in str(refused(scheme, item))


def test_a_model_that_cannot_be_read_at_steps_says_so() -> None:
    """An encoder pools in its own head; a model without a marker cannot join steps."""
    encoder = tokenization(inputs=ModelInputs(is_encoder=True), template="")

    assert "no steps" in str(refused(encoder, Item(TokenIds((5, 6)), steps=Steps("marker", token_id=6))))
    assert "no marker between steps" in str(refused(tokenization(), texts_item()))
