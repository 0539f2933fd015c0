"""Contrast pairs: a good answer of the user's own data against one that is worse beyond doubt.

People's preferences say little about answers that no model gives: the pairs of a data set have two answers on the
topic, in sentences. A reward model that was trained on nothing else may prefer "No." to an answer. Each family here
spoils an answer in one way (another question's answer, its first words, its words shuffled, ...). Lengths are matched
where they can be: some families are longer than the answer, some shorter, and the good answer is often cut to its first
sentences, so that over all families length does not tell which answer is worse.

Pure: a pair depends on the seed, the family, the row and the other answers of the data alone.
"""

from __future__ import annotations

import math
import random
import re
import string
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from service.data.prompts import normalized_opening
from training.contrast_texts import BARE_ANSWERS, CONTENTLESS, INSULTS, RESTATEMENTS
from training.preferences import PreferencePair

CONTRAST_SOURCE = "contrast "
"""Before the name of the family, the source of a contrast pair."""

MIN_WORDS = 6
"""Of the good answer: a shorter one may be no better than what it is compared with."""

MIN_CUT_WORDS = 12
"""Of an answer whose first words are compared with it."""

MAX_QUESTION_CHARS = 400
"""A longer question is not restated."""

SHORTENED_SHARE = 0.4
"""Of the good answers of more than one sentence, those that are cut to their first sentences."""

SINGLE_SHARE = 0.65
"""Of the bare answers, those that are one; the others are several in a row."""

_APOSTROPHE = "['\N{RIGHT SINGLE QUOTATION MARK}]"
_QUOTES = "\"'\N{RIGHT SINGLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_NO_ANSWER = re.compile(
    rf"\b(don{_APOSTROPHE}?t|do not|not) (know|sure|understand)|\bsorry\b|\bcan({_APOSTROPHE}t|not)\b|\bno idea\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(rf"[.!?][{_QUOTES})]?(?=\s)")
_WORD = re.compile(r"\S+")
_NUM_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a data set by length, from which those to other prompts are drawn."""

    lengths: Sequence[int]
    """Characters, ascending."""

    texts: Sequence[str] = field(repr=False)
    openings: Sequence[str] = field(repr=False)
    """The first user message of each answer's prompt, normalized: prompts with the same one count as the same."""

    @classmethod
    def of(cls, pairs: Iterable[PreferencePair]) -> Answers:
        """Collect the chosen answers that are texts of at least `MIN_WORDS` words."""
        answers = sorted(
            (len(pair.chosen), pair.chosen, normalized_opening(pair.prompt))
            for pair in pairs
            if isinstance(pair.chosen, str) and len(pair.chosen.split()) >= MIN_WORDS
        )
        lengths, texts, openings = zip(*answers, strict=True) if answers else ((), (), ())
        return cls(lengths, texts, openings)

    def draw(self, opening: str, low: float, high: float, rng: random.Random, excluded: str = "") -> str | None:
        """Draw an answer to another prompt with ``low`` to ``high`` characters; None where none is found.

        Args:
            opening: of the prompt that it must not belong to.
            low: characters, at least.
            high: characters, at most.
            rng: draws.
            excluded: answers that begin with it are left out; empty: none.
        """
        first, end = bisect_left(self.lengths, low), bisect_right(self.lengths, high)
        for _ in range(_NUM_ATTEMPTS if first < end else 0):
            index = rng.randrange(first, end)
            text = self.texts[index]
            if self.openings[index] != opening and not (excluded and text.startswith(excluded)):
                return text
        return None


@dataclass(frozen=True, slots=True)
class Case:
    """What a family derives a pair from."""

    question: str = field(repr=False)
    """The last user message, or the whole of a plain prompt."""

    opening: str = field(repr=False)
    answer: str = field(repr=False)
    """The good answer."""

    answers: Answers = field(repr=False)
    rng: random.Random = field(repr=False)

    @property
    def words(self) -> list[str]:
        """Words of the answer, separated by white space."""
        return self.answer.split()

    def other_answer(self, low: float, high: float) -> str | None:
        """An answer to another prompt, ``low`` to ``high`` times as long as this one, that does not begin with it."""
        length = len(self.answer)
        return self.answers.draw(self.opening, low * length, high * length, self.rng, self.answer)

    def draw_length(self, low: float, high: float) -> float:
        """Characters, ``low`` to ``high`` times those of the answer, uniform on a logarithmic scale."""
        return len(self.answer) * math.exp(self.rng.uniform(math.log(low), math.log(high)))


Spoiling: TypeAlias = Callable[[Case], str | None]
"""Returns a completion that is worse than the case's answer; None where the case has no such completion."""


def make_contrasts(pairs: Sequence[PreferencePair], counts: Mapping[str, int], seed: int) -> list[PreferencePair]:
    """Return contrast pairs that are made from preference pairs.

    Args:
        pairs: the user's own; each gives one contrast pair of a family at most, of its chosen answer.
        counts: the number of pairs to make by family, names of `FAMILIES`. Of a family to which fewer pairs lend
            themselves there are fewer.
        seed: which pairs are taken for a family, and what is drawn for each, depend on it.

    Returns:
        The families one after another; a pair's ``source`` is `CONTRAST_SOURCE` and the name of its family.
    """
    answers = Answers.of(pairs)
    contrasts: list[PreferencePair] = []
    for family, count in counts.items():
        made = (_contrast(pair, family, answers, rng) for pair, rng in _drawn_order(pairs, family, seed))
        contrasts += _first((pair for pair in made if pair is not None), count)
    return contrasts


def share_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divide a number of pairs among families in proportion to their weights; each share is rounded."""
    whole = sum(weights.values())
    return {family: round(total * weight / whole) for family, weight in weights.items()}


def _first(pairs: Iterable[PreferencePair], count: int) -> list[PreferencePair]:
    return [pair for pair, _ in zip(pairs, range(count), strict=False)]


def _drawn_order(
    pairs: Sequence[PreferencePair], family: str, seed: int
) -> Iterable[tuple[PreferencePair, random.Random]]:
    """Return the pairs in an order drawn for the family, each with a generator of its own."""
    drawn = [(random.Random(f"{seed} {family} {pair.id}"), index) for index, pair in enumerate(pairs)]  # noqa: S311
    keys = sorted((rng.random(), index) for rng, index in drawn)
    return ((pairs[index], drawn[index][0]) for _, index in keys)


def _contrast(pair: PreferencePair, family: str, answers: Answers, rng: random.Random) -> PreferencePair | None:
    if not isinstance(pair.chosen, str):
        return None
    answer = pair.chosen.strip()
    if family not in _OF_WHOLE_ANSWERS:
        answer = _maybe_shortened(answer, rng)
    if len(answer.split()) < MIN_WORDS or _NO_ANSWER.search(answer):
        return None
    spoiled = FAMILIES[family](Case(_question(pair), normalized_opening(pair.prompt), answer, answers, rng))
    if spoiled is None or spoiled == answer:
        return None
    return replace(
        pair, chosen=answer, rejected=spoiled, id=f"{pair.id} {family}", source=CONTRAST_SOURCE + family, reviews=()
    )


def _question(pair: PreferencePair) -> str:
    if isinstance(pair.prompt, str):
        return pair.prompt.strip()
    questions = [message.text for message in pair.prompt if message.role == "user"]
    return questions[-1].strip() if questions else ""


def _maybe_shortened(answer: str, rng: random.Random) -> str:
    """Cut some of the answers of several sentences to their first ones."""
    ends = [match.end() for match in _SENTENCE_END.finditer(answer)]
    ends = [end for end in ends if len(answer[:end].split()) >= MIN_WORDS]
    return answer[: rng.choice(ends)] if ends and rng.random() < SHORTENED_SHARE else answer


# --- Families --------------------------------------------------------------------------------------------------------


def _other_prompt(case: Case) -> str | None:
    length = case.draw_length(0.8, 2.2) / len(case.answer)
    return case.other_answer(0.9 * length, 1.1 * length) or case.other_answer(0.6, 2.5)


def _truncated(case: Case) -> str | None:
    """The answer's first words, not whole sentences."""
    words = list(_WORD.finditer(case.answer))
    if len(words) < MIN_CUT_WORDS:
        return None
    num_words = max(2, round(case.rng.uniform(0.1, 0.8) * len(words)))
    ends = [word.end() for word in words[:num_words] if word.group()[-1] not in f".!?:){_QUOTES}"]
    return case.answer[: ends[-1]].rstrip(",;") if ends else None


def _bare(case: Case) -> str:
    """One bare answer, or several in a row, so that being short is not what is wrong with it."""
    num_answers = 1 if case.rng.random() < SINGLE_SHARE else case.rng.randint(2, 8)
    return " ".join(case.rng.sample(BARE_ANSWERS, num_answers))


def _shuffled(case: Case) -> str:
    return " ".join(case.rng.sample(case.words, len(case.words)))


def _garbled(case: Case) -> str | None:
    """Characters at random, words of other answers at random, keys hit at random, or many wrong letters."""
    rng, length = case.rng, round(case.draw_length(0.8, 2.0))
    kind = rng.randrange(4)
    if kind == 0:
        alphabet = string.ascii_letters + string.digits + string.punctuation
        return " ".join("".join(rng.choices(alphabet, k=rng.randint(2, 9))) for _ in range(max(4, length // 6)))
    if kind == 1:
        return " ".join("".join(rng.choices("asdfghjkl", k=rng.randint(3, 10))) for _ in range(max(4, length // 7)))
    if kind == 2:
        others = [case.answers.draw(case.opening, 40, 2000, rng) for _ in range(4)]
        words = [word for other in others if other for word in other.split()]
        return " ".join(rng.choices(words, k=max(5, length // 6))) if words else None
    share = rng.uniform(0.25, 0.6)
    return "".join(
        rng.choice(string.ascii_lowercase) if letter.isalpha() and rng.random() < share else letter
        for letter in case.answer
    )


def _restated(case: Case) -> str | None:
    """The question instead of an answer, again and again or among contentless sentences, as long as the answer."""
    if not case.question or len(case.question) > MAX_QUESTION_CHARS:
        return None
    length = case.draw_length(0.4, 1.8)
    is_padded = case.rng.random() < 0.5

    def sentence(number: int) -> str:
        if number and is_padded:
            return case.rng.choice(CONTENTLESS)
        return case.rng.choice(RESTATEMENTS).format(question=case.question)

    return _joined(sentence, length)


def _contentless(case: Case) -> str:
    sentences = case.rng.sample(CONTENTLESS, len(CONTENTLESS))
    return _joined(lambda number: sentences[number % len(sentences)], case.draw_length(0.5, 1.8))


def _padded(case: Case) -> str:
    """The answer with contentless sentences before it, after it or on both sides."""
    sentences = case.rng.sample(CONTENTLESS, case.rng.randint(2, 5))
    num_before = case.rng.choice((0, 0, 1, len(sentences)))
    return " ".join([*sentences[:num_before], case.answer, *sentences[num_before:]])


def _spliced(case: Case) -> str | None:
    """The answer with a piece of another one before it, within it or after it, or in place of its end."""
    other = case.other_answer(0.3, 1.5)
    if other is None:
        return None
    piece = other[: next((match.end() for match in _SENTENCE_END.finditer(other)), len(other))].strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(case.answer)] or [len(case.answer)]
    end = case.rng.choice(ends)
    head, tail = case.answer[:end], case.answer[end:].strip()
    return case.rng.choice(
        (f"{piece} {case.answer}", f"{head} {piece} {tail}".strip(), f"{case.answer} {other}", f"{head} {other}")
    )


def _repeated(case: Case) -> str:
    return case.rng.choice((" ", "\n", "\n\n")).join([case.answer] * 3)


def _insulted(case: Case) -> str:
    return f"{case.rng.choice(INSULTS)} {case.answer}"


def _joined(sentence: Callable[[int], str], length: float) -> str:
    """Join sentences until the text has about ``length`` characters; at least one."""
    text = sentence(0)
    number = 1
    while len(text) < 0.85 * length:
        text += f" {sentence(number)}"
        number += 1
    return text


FAMILIES: Mapping[str, Spoiling] = {
    "other_prompt": _other_prompt,
    "truncated": _truncated,
    "bare": _bare,
    "shuffled": _shuffled,
    "garbled": _garbled,
    "restated": _restated,
    "contentless": _contentless,
    "padded": _padded,
    "spliced": _spliced,
    "repeated": _repeated,
    "insulted": _insulted,
}
"""By name, how a family spoils an answer: an answer to another prompt; its own first words; "No." and the like; its
words in another order; garble; the question; sentences without content; such sentences around it; a piece of another
answer in it; itself three times; an insult before it."""

_OF_WHOLE_ANSWERS = frozenset({"truncated"})
