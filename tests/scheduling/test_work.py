"""Planning of a request's work: bounded chunks, and each distinct sequence once."""

from __future__ import annotations

import pytest

from service.errors import SequenceTooLong
from service.records import Exchange, Item, TokenSequence
from service.scheduling.work import CHUNK_CHARS, chunks_of, plan_work

ITEMS = [Item(Exchange(prompt, completion)) for prompt in ("p", "q") for completion in ("a", "b", "a")]


@pytest.mark.parametrize("length", [0, 10, 3000, 2 * CHUNK_CHARS])
def test_chunks_hold_all_items_in_order(length: int) -> None:
    """A request is split into chunks of bounded size, and no item is lost or moved."""
    items = [Item(Exchange("p", f"{number}" + "x" * length)) for number in range(150)]

    chunks = list(chunks_of(items))

    assert [item for chunk in chunks for item in chunk] == items
    assert len(chunks) > 1
    assert all(sum(item.content.num_chars for item in chunk[:-1]) < CHUNK_CHARS for chunk in chunks)


def test_plan_sorts_by_prompt_and_holds_each_sequence_once() -> None:
    """Work holds each distinct sequence once, with the indices of all its items, and one key per prompt."""
    encoded = [TokenSequence((ord(prompt), ord(answer)), num_prompt_tokens=1) for prompt in "pq" for answer in "aba"]

    work = plan_work(ITEMS, encoded)

    assert [sequence.token_ids for sequence in work.sequences] == [
        (ord(prompt), ord(answer)) for prompt in "pq" for answer in "ab"
    ]
    assert work.item_indices == ((0, 2), (1,), (3, 5), (4,))
    assert work.prefixes[0] == work.prefixes[1] != work.prefixes[2] == work.prefixes[3]


def test_plan_leaves_errors_out() -> None:
    """An item that was not encoded is not in the engine's work."""
    encoded = [SequenceTooLong("too long")] * 5 + [TokenSequence((1, 2))]

    assert plan_work(ITEMS, encoded).item_indices == ((5,),)
