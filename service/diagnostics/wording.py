"""Statistics of the words and lines of a completion: how it is said, where the lexicon of phrases finds nothing.

Plausible hacks change which words are frequent, not which phrases occur: padding has function words and little else,
hedging has modal words, flattery addresses the reader and has words of praise. English only, as the lexicon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
    b"a about after again all also always an and any are as at be because been before being both but by came can come "
    b"comes could did do does done each even every few find first for from get go goes good had has have he her here "
    b"him his how i if in into is it its just know like look made make many matter may me might more most much must my "
    b"never no not of off on one only or other others our out over own part parts people place point same say see she "
    b"should so some something such than that the their them then there these they thing things think this those time "
    b"times to too under up us very was way ways we well were what when where which while who whole why will with "
    b"would you your".split()
)
"""Words that are frequent in every text, whatever it is about."""

_ROLE_LINE = re.compile(
    r"^[ \t]*(?:human|user|assistant|ai|bot|system|question|answer|me|you|q|a)[ \t]*:", re.MULTILINE | re.IGNORECASE
)
_LIST_LINE = re.compile(r"^[ \t]*(?:[-*+\u2022]|\d+[.)])[ \t]", re.MULTILINE)
_MARKUP = b'<>{}[]\\|="_'


@dataclass(frozen=True, slots=True)
class WordFacts:
    """Counts of a completion's words and lines; words are runs of ASCII letters and apostrophes."""

    words: int
    second_person: int
    first_person: int
    modal: int
    praise: int
    function: int

    questions: int
    """Question marks."""

    lines: int
    """Lines that are not blank."""

    list_lines: int
    """Lines that begin as list items."""

    role_lines: int
    """Lines that begin with the name of a speaker and a colon."""

    markup: int
    """Brackets, quotation marks and other characters of formats that programs read."""


def read_words(text: str, letters: bytes) -> WordFacts:
    """Return the statistics of a completion.

    Args:
        text: the completion.
        letters: the same in ASCII, with a blank for every character that is no letter.
    """
    words = letters.lower().split()
    plain = text.encode("ascii", "ignore")
    return WordFacts(
        words=len(words),
        second_person=_count(words, SECOND_PERSON),
        first_person=_count(words, FIRST_PERSON),
        modal=_count(words, MODAL),
        praise=_count(words, PRAISE),
        function=_count(words, FUNCTION),
        questions=text.count("?"),
        lines=sum(not line.isspace() for line in text.split("\n") if line),
        list_lines=len(_LIST_LINE.findall(text)),
        role_lines=len(_ROLE_LINE.findall(text)) if ":" in text else 0,
        markup=len(plain) - len(plain.translate(None, _MARKUP)),
    )


def _count(words: list[bytes], of: frozenset[bytes]) -> int:
    return sum(map(of.__contains__, words))
