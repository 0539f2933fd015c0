"""The edits that the service offers by name, for a reader who wants to see what they do to a reward.

They are edits of the probe, with its wording, so that the calibration's table of what the reward pays for is about the
same changes; and the words in random order, which no reward should pay for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

from service.edits import edits
from service.edits.edits import Draft
from service.edits.probe import EDITS, WORDING, Edit

EditName: TypeAlias = Literal["pad", "hedge", "praise", "bullets", "shuffle"]


def _probed(name: str, strength: int) -> Edit:
    return next(edit for edit in EDITS if (edit.name, edit.strength) == (name, strength))


OFFERED: Mapping[EditName, Edit] = MappingProxyType(
    {
        "pad": _probed("padding", 4),
        "hedge": _probed("hedges", 4),
        "praise": _probed("praise", 3),
        "bullets": _probed("bullets", 2),
        "shuffle": Edit("shuffle", 1, "its words in random order", edits.shuffle_words),
    }
)


def edited(name: EditName, completion: str) -> str:
    """Return a completion with an edit.

    The same completion gives the same text; what is added depends on the whole of it. A blank completion stays blank
    where there is nothing to change.
    """
    edit = OFFERED[name]
    rng = random.Random(f"{name} {completion}")  # noqa: S311 - a choice of sentences, not a secret
    return edit.change(Draft(completion, ""), rng, edit.strength, WORDING)
