"""Classes of English words whose rates show how a text is written, whatever it is about.

The classes are of grammar and of common speech acts, not the phrases of known hacks: a policy that hedges uses more
modal verbs and words of doubt, whichever phrase it has settled on. Words of other languages belong to no class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

WordClass: TypeAlias = Literal[
    "hedging", "second_person", "first_person", "praise", "courtesy", "emphasis", "connecting"
]

CLASSES: tuple[WordClass, ...] = get_args(WordClass)

_WORDS: Mapping[WordClass, str] = {
    "hedging": """
        may might could would should perhaps maybe possibly probably likely unlikely presumably apparently seemingly
        supposedly arguably seem seems seemed appear appears appeared suggest suggests suppose guess think believe
        assume imagine doubt unsure uncertain uncertainty tend tends usually generally typically often sometimes
        occasionally roughly approximately somewhat rather fairly partly partially mostly largely depends depending
        necessarily certain sure exactly entirely possible potentially can opinion view impression sense
    """,
    "second_person": "you your yours yourself yourselves you're you've you'll you'd",
    "first_person": "i me my mine myself i'm i've i'll i'd",
    "praise": """
        good great excellent wonderful amazing brilliant fantastic awesome perfect outstanding impressive remarkable
        superb terrific insightful thoughtful clever smart wise intelligent intelligence wisdom insight perceptive
        curious curiosity interesting fascinating beautiful lovely kind generous admirable admire appreciate
        appreciated honor honour honored pleasure delighted delight pleased proud impressed inspiring inspired
        extraordinary exceptional talented gifted sharp keen deep rare best love loved respect praise genius mind
    """,
    "courtesy": """
        please thank thanks sorry apologize apologise apologies welcome glad happy hope hopefully regards sincerely
        gladly kindly pardon excuse help helpful feel free ask asking asked question questions
    """,
    "emphasis": """
        very really truly absolutely definitely certainly surely clearly obviously indeed always never completely
        totally extremely highly incredibly especially particularly simply just so quite such only ever
    """,
    "connecting": """
        however therefore moreover furthermore additionally also although though but yet still because since thus hence
        consequently overall finally first second third firstly secondly lastly next then instead meanwhile besides
        whereas while otherwise nevertheless nonetheless conclusion summary
    """,
}

CLASS_OF: Mapping[bytes, int] = {
    word.encode(): CLASSES.index(name) for name, words in _WORDS.items() for word in words.split()
}
"""The class of a word in lower case, as its index in `CLASSES`."""

_COMMON = """
    a an the this that these those some any no every each either neither both all many much more most few fewer less
    least several other others another same own one ones two three such enough
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    they them their theirs themselves who whom whose which what someone something anyone anything everyone everything
    nobody nothing none
    and or but nor so yet if then than because since although though while whereas unless until when where why how
    whether as of in on at to from by for with without within into onto upon over under between among through during
    before after above below about around against across along behind beyond toward towards up down out off again
    further here there away back
    is am are was were be been being do does did doing done have has had having will would shall should can could may
    might must ought need not n't don't doesn't didn't isn't aren't wasn't weren't won't wouldn't can't cannot
    couldn't shouldn't haven't hasn't hadn't it's that's there's what's i'm i've i'll i'd you're you've you'll you'd
    we're we've we'll they're they've he's she's let's
    go goes going gone went come comes coming came get gets getting got make makes making made take takes taking taken
    took give gives giving given gave put keep keeps keeping kept let lets see sees seeing seen saw look looks looking
    looked find finds finding found know knows knowing known think thinks thinking thought say says saying said tell
    tells telling told ask asks asking asked want wants wanted use uses using used try tries trying tried seem seems
    mean means meant turn turns set start end help helps bear bears matter matters depend depends depending consider
    considering considered understand understanding worth note noting remember
    way ways thing things time times point points part parts place places case cases matter matters kind kinds sort
    sorts lot lots bit people person man woman day days year years world life hand side sides end idea ideas fact facts
    question questions answer answers problem problems reason reasons detail details example examples word words
    picture whole topic topics subject subjects aspect aspects factor factors view views situation situations
    circumstances context course mind rule
    new old good better best great big small large little long short high low right wrong different important true
    general certain sure possible able real full clear simple hard easy next last first second
    very really just only also even still already always never often sometimes usually ever now today once soon later
    perhaps maybe quite rather almost well too much far together exactly simply overall fully
"""

COMMON_WORDS: frozenset[bytes] = frozenset(word.encode() for word in _COMMON.split())
"""Words that a sentence about anything may have; a sentence of these alone says nothing about its subject."""
