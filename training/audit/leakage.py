"""Prompts of the audited pairs that training has seen too: the same, or nearly the same.

A model may score anything on pairs that it was trained on, so an accuracy is worth what is left without them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer

from training.audit.accuracy import wins_of
from training.audit.intervals import Interval, share_interval
from training.audit.scored_pairs import ScoredPairs
from training.preferences import PreferencePair

NEAR_DUPLICATE = 0.8
"""Jaccard similarity of the sets of three-word runs from which two prompts count as nearly the same."""

MIN_WORDS = 8
"""Shorter prompts are alike by chance; for them only an equal prompt counts."""

_ROWS_AT_A_TIME = 256
_NOT_A_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Leakage:
    """What was found of prompts in more than one place.

    ``repeated``: audited pairs whose prompt occurs in more than one of them. The others are None where no training
    pairs are given. ``same_prompt``, ``similar_prompt``: audited pairs whose prompt training has, or nearly so.
    ``same_pair``: those of them with the same completions too. ``accuracy_seen``, ``accuracy_unseen``: with and without
    such a prompt.
    """

    repeated: int
    num_train_pairs: int | None = None
    same_prompt: int | None = None
    similar_prompt: int | None = None
    same_pair: int | None = None
    accuracy_seen: Interval | None = None
    accuracy_unseen: Interval | None = None

    @property
    def num_seen(self) -> int:
        """Audited pairs whose prompt training has, or nearly so."""
        return (self.same_prompt or 0) + (self.similar_prompt or 0)


def measure_leakage(scored: ScoredPairs, train_pairs: Sequence[PreferencePair] | None) -> Leakage:
    """Look for audited prompts among themselves and among those of the training pairs."""
    hashes = [prompt_hash(pair) for pair in scored.pairs]
    repeated = _num_repeated(hashes)
    if train_pairs is None:
        return Leakage(repeated)
    known = {prompt_hash(pair) for pair in train_pairs}
    same = np.array([each in known for each in hashes], dtype=bool)
    similar = ~same & _similar(scored.pairs, train_pairs)
    known_pairs = {_pair_hash(pair) for pair in train_pairs}
    wins, prompts, seen = wins_of(scored.gaps), scored.prompts, same | similar
    return Leakage(
        repeated=repeated,
        num_train_pairs=len(train_pairs),
        same_prompt=int(same.sum()),
        similar_prompt=int(similar.sum()),
        same_pair=sum(_pair_hash(pair) in known_pairs for pair in scored.pairs),
        accuracy_seen=share_interval(wins[seen], prompts[seen]),
        accuracy_unseen=share_interval(wins[~seen], prompts[~seen]),
    )


def prompt_hash(pair: PreferencePair) -> str:
    """Return a hash of the prompt that case, punctuation and blanks do not change."""
    return _hash(normalise(prompt_text(pair)))


def prompt_text(pair: PreferencePair) -> str:
    """Return the prompt as one text: its turns one after another."""
    return pair.prompt if isinstance(pair.prompt, str) else "\n".join(turn.content for turn in pair.prompt)


def normalise(text: str) -> str:
    """Return the words of a text, casefolded, with single blanks between them."""
    return _NOT_A_WORD.sub(" ", text.casefold()).strip()


def _num_repeated(hashes: Sequence[str]) -> int:
    return sum(count for count in Counter(hashes).values() if count > 1)


def _pair_hash(pair: PreferencePair) -> str:
    completions = sorted((normalise(pair.chosen), normalise(pair.rejected)))
    return _hash("\n".join([normalise(prompt_text(pair)), *completions]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _similar(pairs: Sequence[PreferencePair], train_pairs: Sequence[PreferencePair]) -> NDArray[np.bool_]:
    """Whether any prompt of training has a Jaccard similarity of ``NEAR_DUPLICATE`` [pair]."""
    ours = _shingles([prompt_text(pair) for pair in pairs])
    theirs = _shingles(list(dict.fromkeys(prompt_text(pair) for pair in train_pairs)))
    sizes, their_sizes = (np.asarray(matrix.sum(axis=1)).ravel() for matrix in (ours, theirs))
    found = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), _ROWS_AT_A_TIME):
        common = (ours[start : start + _ROWS_AT_A_TIME] @ theirs.T).tocoo()
        rows = common.row + start
        union = sizes[rows] + their_sizes[common.col] - common.data
        found[rows[common.data >= NEAR_DUPLICATE * union]] = True
    return found


def _shingles(prompts: Sequence[str]) -> Any:
    """Sparse 0/1 matrix [prompt, hash of a run of three words]; empty rows for short prompts."""
    texts = [normalise(prompt) for prompt in prompts]
    vectorizer = HashingVectorizer(
        tokenizer=str.split, token_pattern=None, ngram_range=(3, 3), binary=True, norm=None, alternate_sign=False
    )
    return vectorizer.transform([text if len(text.split()) >= MIN_WORDS else "" for text in texts])
