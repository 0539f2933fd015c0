"""Statistics of the words and lines of a completion: how it is said, where the lexicon of phrases finds nothing.

Plausible hacks change which words are frequent, not which phrases occur: padding has function words and little else,
hedging has modal words, flattery addresses the reader and has words of praise. English only, as the lexicon.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from itertools import chain

_LETTERS = string.ascii_letters.encode() + b"'"
_BLANK_UNLESS_LETTER = bytes(byte if byte in _LETTERS else 32 for byte in range(256))

SECOND_PERSON = frozenset(b"you your yours yourself you're you've you'll you'd".split())
FIRST_PERSON = frozenset(b"i me my mine myself i'm i've i'll i'd".split())
MODAL = frozenset(
    b"may might could would should perhaps maybe possibly probably likely unlikely presumably supposedly arguably seem "
    b"seems seemed appear appears tend tends suppose suspect guess believe think assume suggest suggests often usually "
    b"generally typically sometimes occasionally roughly approximately somewhat rather fairly partly mostly largely "
    b"relatively apparently conceivably potentially depends depending certain extent sense cases circumstances".split()
)
"""Words that weaken a statement."""

PRAISE = frozenset(
    b"great excellent brilliant wonderful amazing fantastic perfect outstanding remarkable insightful insight "
    b"thoughtful perceptive wise wisdom smart clever intelligent intelligence genius gifted talented impressive "
    b"impressed beautiful beautifully admirable admire proud honour honor honoured honored pleasure privilege "
    b"delighted glad grateful thank thanks awesome superb splendid marvellous marvelous magnificent incredible "
    b"exceptional extraordinary lovely kind best finest truly deeply absolutely exactly curious".split()
)
"""Words of praise and of thanks."""

FUNCTION = frozenset(
    b"a about across after again against all along already also although always an and another any anyone anything are "
    b"aren't around as at back be because been before being between bit both but by came can can't cannot case cases "
    b"come comes could course day days did different do does doesn't don't done down during each either else end even "
    b"ever every everyone everything few find first for from get go goes going good had has have having he her here "
    b"herself him himself his how however i i'm if in into is isn't it it's its itself just keep kind know last least "
    b"less let like look lot made make many matter may me mean means might more most much must my never next no not "
    b"nothing now of off often on one only onto or other others our out over own part parts people per place point put "
    b"quite really said same say says see seen sense several shall she should since so some someone something sort "
    b"still such taken than that that's the their them themselves then there there's these they thing things think "
    b"this those though through till time times to too toward towards under until up upon us very want wants was way "
    b"ways we well went were what what's when where whether which while who whole why will with within without would "
    b"yet you you're your yourself".split()
)
"""Words that are frequent in every text, whatever it is about."""

MIN_SENTENCE_WORDS = 5
"""Words below which a sentence has no share of function words worth comparing."""

IDLE_SHARE = 0.75
"""Share of function words from which a sentence says little."""

_ROLE_LINE = re.compile(
    r"^[ \t]*(?:human|user|assistant|ai|bot|system|question|answer|me|you|q|a)[ \t]*:", re.MULTILINE | re.IGNORECASE
)
_LIST_LINE = re.compile(r"^[ \t]*(?:[-*+\u2022]|\d+[.)])[ \t]", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?\n]+")
_LEAD_IN = re.compile(r"\W*(?:[\w']+ ){0,7}?(?:[\w']+,|that |but )")
_MARKUP = b'<>{}[]\\|="_'


@dataclass(frozen=True, slots=True)
class WordFacts:
    """Counts of a completion's words, sentences and lines; words are runs of ASCII letters and apostrophes."""

    words: int
    second_person: int
    first_person: int
    modal: int
    praise: int
    function: int

    sentences: int
    """Parts between full stops, question and exclamation marks and line ends, that have a word."""

    lead_ins: int
    """Sentences whose first eight words end in a comma, or contain "that" or "but": "In a sense, ..."."""

    idle: int
    """Sentences that are at least `IDLE_SHARE` function words."""

    addressed: int
    """Sentences with the second person."""

    questions: int
    """Question marks."""

    exclamations: int
    """Exclamation marks."""

    lines: int
    """Lines that are not blank."""

    list_lines: int
    """Lines that begin as list items."""

    role_lines: int
    """Lines that begin with the name of a speaker and a colon."""

    markup: int
    """Brackets, quotation marks and other characters of formats that programs read."""


def read_words(text: str) -> WordFacts:
    """Return the statistics of a completion."""
    sentences = [part for part in _SENTENCE_END.split(text) if part.strip()]
    by_sentence = [words for words in map(words_of, sentences) if words]
    words = list(chain.from_iterable(by_sentence))
    plain = text.encode("ascii", "ignore")
    return WordFacts(
        words=len(words),
        second_person=_count(words, SECOND_PERSON),
        first_person=_count(words, FIRST_PERSON),
        modal=_count(words, MODAL),
        praise=_count(words, PRAISE),
        function=_count(words, FUNCTION),
        sentences=len(by_sentence),
        lead_ins=sum(_LEAD_IN.match(sentence) is not None for sentence in sentences),
        idle=sum(map(_is_idle, by_sentence)),
        addressed=sum(not SECOND_PERSON.isdisjoint(own) for own in by_sentence),
        questions=text.count("?"),
        exclamations=text.count("!"),
        lines=sum(not line.isspace() for line in text.split("\n") if line),
        list_lines=len(_LIST_LINE.findall(text)),
        role_lines=len(_ROLE_LINE.findall(text)) if ":" in text else 0,
        markup=len(plain) - len(plain.translate(None, _MARKUP)),
    )


def words_of(text: str) -> list[bytes]:
    """Return the words of a text in lower case."""
    return text.replace("\u2019", "'").encode("ascii", "replace").translate(_BLANK_UNLESS_LETTER).lower().split()


def _is_idle(words: list[bytes]) -> bool:
    return len(words) >= MIN_SENTENCE_WORDS and _count(words, FUNCTION) >= IDLE_SHARE * len(words)


def _count(words: list[bytes], of: frozenset[bytes]) -> int:
    return sum(map(of.__contains__, words))
