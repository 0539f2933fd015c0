"""Finds prompts of the audited pairs that are in the training pairs too, equal or nearly equal.

Accuracy on pairs that a model was trained on does not measure how well it generalises.
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
"""Smallest Jaccard similarity of the sets of word trigrams at which two prompts count as nearly equal."""

MIN_WORDS = 8
"""Shorter prompts are similar by chance; for them only an equal prompt counts."""

_CHUNK_ROWS = 256
_NOT_A_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Leakage:
    """Audited pairs whose prompt occurs elsewhere; all fields but ``repeated`` are None without training pairs."""

    repeated: int
    """Pairs whose prompt occurs in more than one audited pair."""

    num_train_pairs: int | None = None

    same_prompt: int | None = None
    """Pairs whose prompt is in the training pairs."""

    similar_prompt: int | None = None
    """Pairs of which a nearly equal prompt, but no equal one, is in the training pairs."""

    same_pair: int | None = None
    """Pairs that are in the training pairs with prompt and both completions."""

    accuracy_seen: Interval | None = None
    """Accuracy on the pairs with an equal or nearly equal prompt in the training pairs."""

    accuracy_unseen: Interval | None = None
    """Accuracy on all other pairs."""

    @property
    def num_seen(self) -> int:
        """Audited pairs with an equal or nearly equal prompt in the training pairs."""
        return (self.same_prompt or 0) + (self.similar_prompt or 0)


def measure_leakage(scored: ScoredPairs, train_pairs: Sequence[PreferencePair] | None) -> Leakage:
    """Search for the audited prompts in the other audited pairs and in the training pairs."""
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
    """Return a hash of the prompt that does not depend on case, punctuation and whitespace."""
    return _hash(normalise(prompt_text(pair)))


def prompt_text(pair: PreferencePair) -> str:
    """Return the prompt as one text: its messages, joined by line feeds."""
    return pair.prompt if isinstance(pair.prompt, str) else "\n".join(turn.text for turn in pair.prompt)


def normalise(text: str) -> str:
    """Return the words of a text, casefolded, with single spaces between them."""
    return _NOT_A_WORD.sub(" ", text.casefold()).strip()


def _num_repeated(hashes: Sequence[str]) -> int:
    return sum(count for count in Counter(hashes).values() if count > 1)


def _pair_hash(pair: PreferencePair) -> str:
    completions = sorted(map(normalise, pair.serialized))
    return _hash("\n".join([normalise(prompt_text(pair)), *completions]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _similar(pairs: Sequence[PreferencePair], train_pairs: Sequence[PreferencePair]) -> NDArray[np.bool_]:
    """Whether the Jaccard similarity with any training prompt is at least ``NEAR_DUPLICATE`` [pair]."""
    audited = _trigrams([prompt_text(pair) for pair in pairs])
    trained = _trigrams(list(dict.fromkeys(prompt_text(pair) for pair in train_pairs)))
    sizes, train_sizes = (np.asarray(matrix.sum(axis=1)).ravel() for matrix in (audited, trained))
    found = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), _CHUNK_ROWS):
        common = (audited[start : start + _CHUNK_ROWS] @ trained.T).tocoo()
        rows = common.row + start
        union = sizes[rows] + train_sizes[common.col] - common.data
        found[rows[common.data >= NEAR_DUPLICATE * union]] = True
    return found


def _trigrams(prompts: Sequence[str]) -> Any:
    """Return a sparse 0/1 matrix [prompt, hash of a word trigram]; the rows of short prompts are empty."""
    texts = [normalise(prompt) for prompt in prompts]
    vectorizer = HashingVectorizer(
        tokenizer=str.split, token_pattern=None, ngram_range=(3, 3), binary=True, norm=None, alternate_sign=False
    )
    return vectorizer.transform([text if len(text.split()) >= MIN_WORDS else "" for text in texts])
