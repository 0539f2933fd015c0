"""Where the steps of a text end, on its token ids.

A step ends at a marker that training put after it, or with an assistant turn. Its last token is found on token ids and
never guessed: where it cannot be determined, the item is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from service.errors import InvalidRequest
from service.records import Exchange, Item, ModelInputs, Steps, TemplatedText, TokenIds

MAX_BORDER_CHARS = 16_000_000
"""Characters that are rendered or tokenized again to find the ends of the steps of one item. It bounds the time that
one item takes: some seconds."""


@dataclass(frozen=True, slots=True)
class StepMarker:
    """What training put after each step."""

    text: str | None = None
    """None: only the token id is known."""

    token_id: int | None = None
    """None: the marker is no single token; the head is read at its last one."""

    separate: bool = False
    """Whether each step was tokenized alone and followed by the token id."""


@dataclass(frozen=True, slots=True)
class StepReading:
    """How a model is read at steps."""

    marker: StepMarker = StepMarker()

    max_steps: int = 512
    """Steps of one item."""

    pad_token_id: int | None = None
    """The token that pooling skips at the end of a text; None: it skips none."""

    refusal: str = ""
    """Why the model cannot be read at steps; empty where it can."""


PLAIN_READING = StepReading()
"""Of a model without a marker."""


@dataclass(frozen=True, slots=True)
class StepEnds:
    """What is known about the ends of an item's steps before its text is tokenized."""

    token_id: int | None = None
    """The token that ends each step; None: ``chars`` says it."""

    count: int | None = None
    """Number of steps; None: as many as there are markers."""

    chars: tuple[int, ...] = ()
    """Characters of the text up to the end of each step, ascending."""

    skipped_id: int | None = None
    """The token that pooling skips: a step is read at the last other token; None: it skips none."""

    texts: tuple[str, ...] = field(default=(), repr=False)
    """Steps that are tokenized alone, each followed by ``token_id``; empty where the text contains the steps."""


def refuse_steps(item: Item, reading: StepReading, inputs: ModelInputs) -> InvalidRequest | None:
    """Return why an item's steps cannot be read, before its text is rendered; None where they may be."""
    steps, marker = item.steps, reading.marker
    if steps is None:
        return None
    if reading.refusal or inputs.is_encoder:
        return InvalidRequest(reading.refusal or "The model's head reads one token of a text, and no steps.")
    if len(steps.texts) > reading.max_steps:
        return _too_many(len(steps.texts), reading)
    match steps.kind, item.content:
        case "texts", Exchange():
            if marker.text is None and not marker.separate:
                return InvalidRequest(
                    "The model has no marker between steps (steps in its reward_model.json): send a completion of "
                    "several assistant turns with steps: turns, or mark the steps and send steps: marker."
                )
        case "turns", Exchange():
            pass
        case "marker", Exchange() | TemplatedText() | TokenIds():
            if steps.token_id is None and marker.token_id is None:
                return InvalidRequest("The model has no marker token: the item needs step_token_id.")
        case _:
            return InvalidRequest("Steps are texts or turns only where an item has a prompt.")
    return None


def marked_completion(steps: Steps, marker: StepMarker) -> str:
    """Return the completion of steps that are texts: each is followed by the marker, if that is a part of the text."""
    return "" if marker.separate else "".join(text + (marker.text or "") for text in steps.texts)


def ends_of_texts(steps: Steps, marker: StepMarker, text: str, start: int) -> StepEnds | InvalidRequest:
    """Return the ends of steps that are texts.

    Args:
        steps: of kind ``texts``.
        marker: of the model.
        text: the rendered text, with the completion of `marked_completion`.
        start: characters before the completion.
    """
    if marker.separate:
        return StepEnds(marker.token_id, len(steps.texts), texts=steps.texts)
    if marker.token_id is not None:
        return StepEnds(marker.token_id, len(steps.texts))
    completion = marked_completion(steps, marker)
    begin = text.find(completion, start)
    if begin < 0:
        return InvalidRequest(
            "The chat template changes the completion, so the ends of its steps are unknown: send a rendered text, or "
            "token ids."
        )
    lengths = (len(one) + len(marker.text or "") for one in steps.texts)
    return StepEnds(chars=tuple(accumulate(lengths, initial=begin))[1:])


def find_positions(
    ends: StepEnds,
    ids: Sequence[int],
    text: str,
    num_prompt_tokens: int | None,
    encode: Callable[[str], Sequence[int]],
) -> tuple[int, ...] | InvalidRequest:
    """Return the index of the last token of each step, ascending.

    Args:
        ends: what is known of them.
        ids: token ids of the text.
        text: the text; not read where a token id ends each step.
        num_prompt_tokens: leading tokens that belong to the prompt, where no step can end; None: unknown.
        encode: tokenizes a text without special tokens around it.
    """
    if ends.token_id is not None:
        return _marker_positions(ends, ids, num_prompt_tokens)
    counts = _tokens_up_to(ends.chars, ids, text, encode)
    if counts is None:
        return InvalidRequest("The end of a step is within a token, so its last token is unknown.")
    return _distinct([_last_read(ids, count, ends.skipped_id) for count in counts])


def check_count(positions: Sequence[int], reading: StepReading) -> InvalidRequest | None:
    """Return an error where there are more steps than the limit; None otherwise."""
    return _too_many(len(positions), reading) if len(positions) > reading.max_steps else None


def _marker_positions(
    ends: StepEnds, ids: Sequence[int], num_prompt_tokens: int | None
) -> tuple[int, ...] | InvalidRequest:
    if num_prompt_tokens is None and ends.count is not None:
        return InvalidRequest("It is unknown where the completion begins, so the ends of its steps are unknown.")
    first = num_prompt_tokens or 0
    found = tuple(index for index in range(first, len(ids)) if ids[index] == ends.token_id)
    if not found:
        return InvalidRequest("The item has no marker token, at which its steps would end.")
    if ends.count is not None and len(found) != ends.count:
        return InvalidRequest(
            f"The tokens of the completion have {len(found)} markers for {ends.count} steps: a step contains the "
            "marker, or the chat template changes the completion."
        )
    return found


def _tokens_up_to(
    chars: Sequence[int], ids: Sequence[int], text: str, encode: Callable[[str], Sequence[int]]
) -> list[int] | None:
    """Return how many leading tokens each number of characters has; None where a token crosses one of these borders.

    The parts between the borders, tokenized alone, have the tokens of the text, or each text up to a border has: either
    shows that no token crosses it.
    """
    borders = [0, *chars, len(text)] if chars[-1] < len(text) else [0, *chars]
    parts = [encode(text[begin:end]) for begin, end in pairwise(borders)]
    if [token for part in parts for token in part] == list(ids):
        return list(accumulate(map(len, parts)))[: len(chars)]
    if sum(chars) > MAX_BORDER_CHARS:
        return None
    prefixes = [encode(text[:end]) for end in chars]
    if any(list(prefix) != list(ids[: len(prefix)]) for prefix in prefixes):
        return None
    return list(map(len, prefixes))


def _last_read(ids: Sequence[int], count: int, skipped_id: int | None) -> int:
    """Return the index of the last of ``count`` leading tokens that pooling reads."""
    return next((index for index in range(count - 1, -1, -1) if ids[index] != skipped_id), 0)


def _distinct(positions: Sequence[int]) -> tuple[int, ...] | InvalidRequest:
    if not positions or any(first >= second for first, second in pairwise(positions)):
        return InvalidRequest("Two steps end at the same token, so they have no rewards of their own.")
    return tuple(positions)


def _too_many(count: int, reading: StepReading) -> InvalidRequest:
    return InvalidRequest(f"The item has {count} steps; the limit is {reading.max_steps}.")
