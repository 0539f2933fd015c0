"""The sets of English words whose counts the detectors read, and the code of a word: which of all sets it is in.

A completion's words are looked up once. Counts of a set, in the whole text or in a sentence, are then counts of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import repeat

from service.diagnostics.word_classes import CLASS_OF, CLASSES, COMMON_WORDS

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

_SETS: Mapping[str, frozenset[bytes]] = {
    "second_person": SECOND_PERSON,
    "first_person": FIRST_PERSON,
    "modal": MODAL,
    "praise": PRAISE,
    "function": FUNCTION,
    "common": COMMON_WORDS,
    **{
        f"class {index}": frozenset(word for word, of in CLASS_OF.items() if of == index)
        for index in range(len(CLASSES))
    },
}


def _signature(word: bytes) -> tuple[bool, ...]:
    return tuple(word in words for words in _SETS.values())


_SIGNATURES = sorted({_signature(word) for words in _SETS.values() for word in words})
_CODE_OF = {
    word: 1 + _SIGNATURES.index(_signature(word)) for word in {word for words in _SETS.values() for word in words}
}
"""0 is the code of a word that is in no set."""

MEMBERS: Mapping[str, bytes] = {
    name: bytes(1 + code for code, signature in enumerate(_SIGNATURES) if signature[column])
    for column, name in enumerate(_SETS)
}
"""The codes of the words of each set."""

CLASS_MEMBERS = tuple(MEMBERS[f"class {index}"] for index in range(len(CLASSES)))
"""The codes of the words of each of `CLASSES`."""


def codes_of(words: Iterable[bytes]) -> bytes:
    """Return the code of each word, a byte each."""
    return bytes(map(_CODE_OF.get, words, repeat(0)))


def count(codes: bytes, members: bytes) -> int:
    """Return how many of some codes are among those of a set."""
    return len(codes) - len(codes.translate(None, members))
