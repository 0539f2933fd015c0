"""Edits of a completion: pure, seeded functions that add style, repeat, cut or replace and never improve an answer.

Every function takes a draft, a random generator, a strength and the wording of what it adds. The same arguments give
the same text. An edit that does not apply to a text returns it unchanged, but for whitespace around it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from service.edits.phrases import Phrases
from service.records import Message

EMOJI = "🚀✅🔥🎉🌟💡👍🙌💯⭐📌🎯"
MAX_QUESTION_CHARS = 300
"""Characters of a question that are restated."""

_BOUNDARY = re.compile(r"(?<=[.!?])(?<!\s\d\.)(?<!\A\d\.)(?<!\s\d\d\.)\s+|(?<!\s)\s*\n\s*")
"""Whitespace between sentences or lines; not that after the number of a list item. A match begins where whitespace
begins, so that the time is linear in the characters."""

_LIST_MARK = re.compile(r"(?:[-*+]|\d+[.)])\s+")

_CLAUSE = re.compile(r"(?<=[.!?,;:])\s+")
_WORD = re.compile(r"\S+")
_FIRST_PERSON = re.compile(r"I\b")


@dataclass(frozen=True, slots=True)
class Draft:
    """A completion to be edited."""

    completion: str = field(repr=False)

    question: str = field(repr=False)
    """The text of the last user turn."""

    others: Sequence[str] = field(default=(), repr=False)
    """Completions of other prompts."""

    @property
    def sentences(self) -> list[str]:
        """Sentences of the completion, split after ``.``, ``!`` and ``?`` and at line ends; none of a blank one."""
        return [part for part in _BOUNDARY.split(self.completion.strip()) if part]


Change: TypeAlias = Callable[[Draft, random.Random, int, Phrases], str]
"""Returns the changed completion, for a strength of 1 or more, of which each function gives the meaning."""


def add_padding(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Add ``strength`` sentences without content: one at the end, further ones after sentences of the answer."""
    added = _some(phrases.padding, strength, rng)
    last = len(draft.sentences) - 1
    after: dict[int, str] = {}
    for number, sentence in enumerate(added):
        index = rng.randint(0, max(0, last)) if number else last
        after[index] = f"{after.get(index, '')} {sentence}"
    return _with_sentences(draft, lambda index, sentence: sentence + after.get(index, "")) or added[0]


def add_hedges(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Begin ``strength`` of the sentences, or all if there are fewer, with a hedge."""
    hedges = {index: rng.choice(phrases.hedges) for index in _some_sentences(draft, rng, strength)}
    return _with_sentences(
        draft, lambda index, sentence: _hedged(hedges[index], sentence) if index in hedges else sentence
    )


def add_hedge_words(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Put ``strength`` adverbs that weaken a statement after words, inside of the sentences."""
    return _with_words_after(draft.completion, rng, [rng.choice(phrases.hedge_words) for _ in range(strength)])


def praise_within(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Put praise of the user after ``strength`` of the sentences."""
    chosen = _some_sentences(draft, rng, strength)
    added = dict(zip(chosen, _some((*phrases.openings, *phrases.closings), len(chosen), rng), strict=True))
    return _with_sentences(draft, lambda index, sentence: f"{sentence} {added[index]}" if index in added else sentence)


def praise_user(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Put praise of the user before the answer; from strength 2 after it too, from 3 a further sentence before it."""
    before = rng.sample(phrases.openings, min(max(1, strength - 1), len(phrases.openings)))
    after = [rng.choice(phrases.closings)] if strength > 1 else []
    return " ".join([*before, draft.completion.strip(), *after])


def make_bullets(draft: Draft, rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Make each sentence a list item; from strength 2 each clause, with its first word bold."""
    mark = rng.choice(("- ", "* "))
    if strength == 1:
        return "\n".join(mark + _marked(sentence)[1] for sentence in draft.sentences)
    clauses = [part for sentence in draft.sentences for part in _CLAUSE.split(_marked(sentence)[1]) if part]
    return "\n".join(f"{mark}{_bold_first(clause)}" for clause in clauses)


def add_headers(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Put a markdown header before the answer; from strength 2 one before every second sentence."""
    sentences = draft.sentences
    starts = range(0, len(sentences), 2) if strength > 1 else range(min(1, len(sentences)))
    titles = dict(zip(starts, _some(phrases.titles, len(starts), rng), strict=True))
    return _with_sentences(
        draft,
        lambda index, sentence: (
            f"{_blank_line(index)}## {titles[index]}\n\n{sentence}" if index in titles else sentence
        ),
    )


def embolden(draft: Draft, rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Make ``strength`` words of each sentence bold."""
    return _with_sentences(draft, lambda _, sentence: _with_bold_words(sentence, strength, rng))


def add_emoji(draft: Draft, rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Put an emoji after ``strength`` of the sentences, the last ones; where there are fewer, more after some."""
    count = len(draft.sentences)
    after = [""] * count
    for number in range(strength if count else 0):
        after[count - 1 - number % count] += f" {rng.choice(EMOJI)}"
    return _with_sentences(draft, lambda index, sentence: sentence + after[index])


def restate_question(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Restate the question before the answer; from strength 2 after it too."""
    question = draft.question.strip()[:MAX_QUESTION_CHARS]
    if not question:
        return draft.completion
    stated = [text.replace("{question}", question) for text in rng.sample(phrases.restatements, 2)]
    return " ".join([stated[0], draft.completion.strip(), *(stated[1:] if strength > 1 else ())])


def repeat_answer(draft: Draft, _rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Give the answer ``strength`` further times."""
    return "\n\n".join([draft.completion.strip()] * (1 + strength))


def add_citations(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Put invented references after ``strength`` of the sentences, and list them at the end from strength 3."""
    numbered = rng.random() < 0.5
    marks: dict[int, str] = {}
    references = []
    for number, index in enumerate(_some_sentences(draft, rng, strength), start=1):
        author, other = rng.sample(phrases.authors, 2)
        year, page = rng.randint(1985, 2024), rng.randint(1, 400)
        references.append(f"[{number}] {author}, {other} et al. ({year}), pp. {page}-{page + rng.randint(2, 30)}")
        marks[index] = f" [{number}]" if numbered else f" ({author} & {other}, {year})"
    text = _with_sentences(draft, lambda index, sentence: sentence + marks.get(index, ""))
    return "\n".join([text, "", *references]) if strength > 2 and references else text


def capitalize(draft: Draft, rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Write ``strength`` of the sentences in capitals."""
    chosen = _some_sentences(draft, rng, strength)
    return _with_sentences(draft, lambda index, sentence: sentence.upper() if index in chosen else sentence)


def add_figures(draft: Draft, rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Put ``strength`` invented figures after words."""
    return _with_words_after(draft.completion, rng, [_figure(rng) for _ in range(strength)])


def speak_for_user(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Go on with ``strength`` turns of the user, with and without the names of the speakers."""
    user, assistant = rng.choice((("Human: ", "Assistant: "), ("User: ", "Assistant: "), ("", ""), ("Me: ", "You: ")))
    turns = [draft.completion.strip()]
    for number in range(strength):
        turns.append(user + rng.choice(phrases.user_turns))
        if number + 1 < strength or rng.random() < 0.5:
            turns.append(assistant + rng.choice(phrases.replies))
    return "\n\n".join(turns)


def truncate(draft: Draft, _rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Return the first 1 / (1 + ``strength``) of the words."""
    words = list(_WORD.finditer(draft.completion))
    return draft.completion[: words[max(1, len(words) // (1 + strength)) - 1].end()] if words else draft.completion


def shuffle_words(draft: Draft, rng: random.Random, _strength: int, _phrases: Phrases) -> str:
    """Return the words in random order."""
    words = _WORD.findall(draft.completion)
    return " ".join(rng.sample(words, len(words)))


def swap_answer(draft: Draft, rng: random.Random, _strength: int, _phrases: Phrases) -> str:
    """Return an answer to another prompt."""
    return rng.choice(draft.others) if draft.others else draft.completion


def question_of(prompt: str | tuple[Message, ...]) -> str:
    """Return the text of the last user turn, or the whole of a plain prompt."""
    if isinstance(prompt, str):
        return prompt
    questions = [turn.text for turn in prompt if turn.role == "user"]
    return questions[-1] if questions else prompt[-1].text


def lowered(sentence: str) -> str:
    """Return a sentence as it continues another: its first letter in lower case, unless the word needs a capital."""
    first = sentence.split(" ", 1)[0]
    if _FIRST_PERSON.match(sentence) or (len(first) > 1 and first.isupper()):
        return sentence
    return sentence[:1].lower() + sentence[1:]


def _some(phrases: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return phrases in random order, each once before any comes again."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += rng.sample(phrases, min(count - len(chosen), len(phrases)))
    return chosen


def _marked(sentence: str) -> tuple[str, str]:
    """Return the mark of a list item with its whitespace, empty for other sentences, and the rest."""
    found = _LIST_MARK.match(sentence)
    return ("", sentence) if found is None else (found.group(), sentence[found.end() :])


def _hedged(hedge: str, sentence: str) -> str:
    mark, rest = _marked(sentence)
    return mark + hedge + lowered(rest)


def _bold_first(clause: str) -> str:
    first, _, others = clause.partition(" ")
    return f"**{first}** {others}".rstrip()


def _with_bold_words(sentence: str, count: int, rng: random.Random) -> str:
    words = list(_WORD.finditer(sentence))
    for word in sorted(rng.sample(words, min(count, len(words))), key=lambda match: -match.start()):
        sentence = f"{sentence[: word.start()]}**{word.group()}**{sentence[word.end() :]}"
    return sentence


def _some_sentences(draft: Draft, rng: random.Random, count: int) -> list[int]:
    """Return the indices of some sentences of a draft, in order."""
    total = len(draft.sentences)
    return sorted(rng.sample(range(total), min(count, total)))


def _with_sentences(draft: Draft, change: Callable[[int, str], str]) -> str:
    """Return the completion with each sentence changed, and the whitespace between sentences as it was."""
    text = draft.completion.strip()
    boundaries = [match.group() for match in _BOUNDARY.finditer(text)]
    sentences = [change(index, sentence) for index, sentence in enumerate(draft.sentences)]
    return "".join(part for pair in zip(sentences, [*boundaries, ""], strict=False) for part in pair)


def _with_words_after(text: str, rng: random.Random, added: Sequence[str]) -> str:
    """Return a text with each of some words after one of its own, chosen at random."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    places = sorted(rng.choices(words, k=len(added)), key=lambda match: -match.end())
    for place, word in zip(places, added, strict=True):
        text = f"{text[: place.end()]} {word}{text[place.end() :]}"
    return text


def _blank_line(index: int) -> str:
    return "\n\n" if index else ""


def _figure(rng: random.Random) -> str:
    number = rng.randint(2, 9999)
    return rng.choice((f"{number / 100:.1f}%", f"({number})", f"{number:,}", f"{number / 37:.3f}"))
