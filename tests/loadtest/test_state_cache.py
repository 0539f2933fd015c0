"""State statistics on disk: each distinct text is computed once, also after an interruption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from loadtest import state_cache
from loadtest.state_cache import StateCache
from service.errors import CalibrationError
from service.records import Score, TokenSequence


class CountedModel:
    """Gives the sum of the tokens as the only statistic, and notes what it was asked for; fails after some blocks."""

    def __init__(self, num_blocks: int = 1000) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.blocks_left = num_blocks

    def __call__(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[int, object]]:
        if not self.blocks_left:
            raise KeyboardInterrupt
        self.blocks_left -= 1
        self.seen += [sequence.row for sequence in sequences]
        yield from (
            (index, Score(0.0, traits=(float(sum(one.row)),))) for index, one in reversed([*enumerate(sequences)])
        )


SEQUENCES = [TokenSequence((number % 7, number % 3), num_prompt_tokens=1) for number in range(60)]
EXPECTED = [(float(sum(sequence.row)),) for sequence in SEQUENCES]


def complete(path: Path, model: CountedModel, version: str = "1") -> list[tuple[float, ...]]:
    return StateCache(path, ["model", version]).complete(SEQUENCES, model, lambda _: None)


def test_a_text_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal texts share a computation; an interrupted measurement has lost one block, and a complete one computes none.

    Texts with a common prefix are next to each other, and those of another version are computed anew.
    """
    monkeypatch.setattr(state_cache, "BLOCK_ITEMS", 4)
    path, model, second, third = tmp_path / "items.states", CountedModel(2), CountedModel(), CountedModel()

    with pytest.raises(KeyboardInterrupt):
        complete(path, model)
    assert len(model.seen) == 8
    assert complete(path, second) == EXPECTED
    assert sorted(model.seen + second.seen) == sorted({sequence.row for sequence in SEQUENCES})
    assert second.seen == sorted(second.seen)
    assert complete(path, third) == EXPECTED
    assert third.seen == []
    complete(path, third, version="2")
    assert len(third.seen) == 21


def test_an_item_without_states_is_an_error(tmp_path: Path) -> None:
    """A model that gives a reward and no statistics is not measured as if it had given some."""
    with pytest.raises(CalibrationError, match="no states for 21 items"):
        StateCache(tmp_path / "items.states", []).complete(
            SEQUENCES, lambda block: ((index, Score(0.0)) for index in range(len(block))), lambda _: None
        )
