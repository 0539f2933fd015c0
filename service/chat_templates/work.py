"""Counts the work of rendering a chat template, in characters, and ends a rendering that exceeds its allowance.

Pure: no clock, no template engine. Values that a template makes are weighed before or when they are made, so that
neither their number nor their size can grow without being paid for. Weights of lists, tuples and mappings are
remembered, which is valid because nothing in the sandbox changes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.runtime import Undefined
from jinja2.utils import Namespace

STEP = 256
"""Work of one step of a template, in characters: both take about a microsecond."""

BASE_WORK = 50_000_000
WORK_PER_MESSAGE = 250_000
WORK_PER_CHAR = 128
"""Allowance of one rendering. The templates of well-known models need less than a hundredth of it."""

BASE_CHARS = 262_144
CHARS_PER_MESSAGE = 4_096
CHARS_PER_CHAR = 4
"""The same of the rendered text, in characters: tokenizing takes about a second per million."""

MAX_INTEGER_BITS = 4_096
_VIEWS: tuple[type[Any], ...] = tuple(map(type, ({}.items(), {}.keys(), {}.values())))
_CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    *_VIEWS,
)  # no abstract classes, whose checks take ten times as long
_SIZED: tuple[type[Any], ...] = (str, range, *_CONTAINERS)
_WIDE_FORMAT = re.compile(r"\d{4,}|\*|:[^{}:]*\{")
"""A width of four digits or more, or one that is given beside the format."""


class TemplateTooExpensive(Exception):
    """A rendering exceeds its allowance of work or characters."""


class WorkMeter:
    """The work that is left to one rendering.

    Args:
        num_messages: turns of the conversation.
        num_chars: characters of the conversation, tools included.
    """

    def __init__(self, num_messages: int, num_chars: int) -> None:
        self._left = BASE_WORK + WORK_PER_MESSAGE * num_messages + WORK_PER_CHAR * num_chars
        self.max_chars = BASE_CHARS + CHARS_PER_MESSAGE * num_messages + CHARS_PER_CHAR * num_chars
        # The values are retained, so that no other value gets the identity of a remembered one.
        self._known: dict[int, tuple[Any, int, int]] = {}

    def spend(self, work: int) -> None:
        """Take work off what is left.

        Raises:
            TemplateTooExpensive: there is not enough left, or the work is negative, as with a negative width: it would
                add to the allowance.
        """
        self._left -= work
        if self._left < 0 or work < 0:
            raise TemplateTooExpensive

    def pay(self, value: Any, work: int) -> None:
        """Spend the weight of a value, and some work with it.

        Raises:
            TemplateTooExpensive: there is not enough left.
        """
        self._left -= work + (len(value) if type(value) is str else self.weigh(value))
        if self._left < 0:
            raise TemplateTooExpensive

    def weigh(self, value: Any) -> int:
        """Return about how many characters a value has when it is printed; at most what is left."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, _CONTAINERS):
            return self._measure(value)[0]
        if isinstance(value, Namespace):
            return STEP + sum(self.weigh_entry(entry) for entry in _attributes(value).values())
        return STEP

    def weigh_entry(self, value: Any) -> int:
        """Return the weight of a value that is put into another one.

        Raises:
            TemplateTooExpensive: it is a namespace, which can be changed later and so has no fixed weight.
        """
        if isinstance(value, Namespace):
            raise TemplateTooExpensive
        return self.weigh(value)

    def depth(self, value: Any) -> int:
        """Return how many lists and mappings are inside each other."""
        return self._measure(value)[1] if isinstance(value, _CONTAINERS) else 0

    def counted(self, values: Any, work: int = STEP) -> Any:
        """Return the values of a loop, which pays for each of them.

        Args:
            values: anything that is iterated over.
            work: of one value.
        """
        if isinstance(values, _SIZED):
            self.spend(work * len(values))
            return values
        if isinstance(values, Undefined) or not isinstance(values, Iterable):
            return values
        return self._paying(values, work)

    def check_format(self, text: Any, *values: Any) -> None:
        """Pay for formatting values into a text, whatever it makes of them.

        Raises:
            TemplateTooExpensive: the text has widths of four digits or more.
        """
        if _WIDE_FORMAT.search(text):
            raise TemplateTooExpensive
        num_places = text.count("%") + text.count("{") + 1
        self.spend(len(text) + num_places * (1_000 + sum(map(self.weigh, values))))

    def check_number(self, value: Any) -> None:
        """Refuse an integer of more than ``MAX_INTEGER_BITS``."""
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise TemplateTooExpensive

    def _paying(self, values: Iterable[Any], work: int) -> Iterator[Any]:
        for value in values:
            self.spend(work)
            yield value

    def _measure(self, value: Any) -> tuple[int, int]:
        known = self._known.get(id(value))
        if known is not None:
            return known[1], known[2]
        self.spend(STEP)
        weight, depth = STEP, 0
        for entry in _entries(value):
            weight += STEP // 4 + self.weigh_entry(entry)
            depth = max(depth, self.depth(entry))
            if weight > self._left:
                raise TemplateTooExpensive
        self._known[id(value)] = (value, weight, depth + 1)
        return weight, depth + 1


def _entries(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield entry
    else:
        yield from value


def _attributes(namespace: Namespace) -> dict[str, Any]:
    attributes: dict[str, Any] = object.__getattribute__(namespace, "_Namespace__attrs")
    return attributes
