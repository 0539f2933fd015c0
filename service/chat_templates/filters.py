"""The filters and functions of chat templates, and what those pay whose results may be longer than their arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

from service.chat_templates.work import STEP, TemplateTooExpensive, WorkMeter

ABSENT_FILTERS = frozenset({"pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"})
ABSENT_TESTS = frozenset({"filter", "test"})
"""What takes more than linear time, or gives other results at each rendering or in each environment."""

ITERATING_FILTERS = frozenset(
    {
        "batch",
        "dictsort",
        "groupby",
        "items",
        "join",
        "list",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "reverse",
        "select",
        "selectattr",
        "slice",
        "sort",
        "sum",
        "unique",
    }
)
WIDTH_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate"})
"""Filters with an integer that makes their result larger."""

CHEAP_FILTERS = frozenset({"attr", "count", "d", "default", "first", "last", "length", "safe"})
"""What takes the same time for a large value as for a small one."""
CHEAP_TESTS = frozenset(
    {
        "boolean",
        "callable",
        "defined",
        "even",
        "false",
        "float",
        "integer",
        "iterable",
        "mapping",
        "none",
        "number",
        "odd",
        "sameas",
        "sequence",
        "string",
        "true",
        "undefined",
        "escaped",
    }
)
DATE_FORMAT = re.compile(r"(?:[^%]|%[-_0^#]?[aAbBdeDFhjmuUVwWxyYG%])*")
"""Formats of dates without the time of day: a rendering must not depend on when exactly it takes place."""


class ChatNamespace(Namespace):
    """A namespace without private attributes, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("Chat templates cannot store private attributes on a namespace.")


def pay_replace(meter: WorkMeter, text: Any, old: Any, new: Any, count: Any = None) -> None:
    """Pay for a text in which another one is replaced."""
    del count
    text, old = str(text), str(old)
    meter.spend(len(text) + (text.count(old) if old else len(text) + 1) * meter.weigh(new))


def _pay_join(meter: WorkMeter, values: Sequence[Any], d: Any = "", *_: Any, **__: Any) -> None:
    meter.spend(len(values) * meter.weigh(d) + sum(map(meter.weigh, values)))


def _pay_indent(meter: WorkMeter, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    meter.spend((str(text).count("\n") + 1) * (width if isinstance(width, int) else meter.weigh(width)))


def _pay_format(meter: WorkMeter, text: Any, *args: Any, **kwargs: Any) -> None:
    meter.check_format(str(text), *args, *kwargs.values())


def _pay_sum(_: WorkMeter, values: Any, attribute: Any = None, start: Any = 0) -> None:
    del values, attribute
    if not isinstance(start, int | float):
        raise TemplateTooExpensive


def _pay_json(
    meter: WorkMeter,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> None:
    del ensure_ascii, sort_keys
    width = indent if isinstance(indent, int) else meter.weigh(indent or "")
    around = width * (meter.depth(value) + 1) + (meter.weigh(separators) if separators else 0)
    meter.spend((meter.weigh(value) // (STEP // 4) + 1) * around)


BEFOREHAND: Mapping[str, Callable[..., None]] = {
    "replace": pay_replace,
    "join": _pay_join,
    "indent": _pay_indent,
    "format": _pay_format,
    "sum": _pay_sum,
    "tojson": _pay_json,
}
"""What filters pay before they run whose results may be longer than all their arguments."""


def to_json(
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> str:
    """Return a value as JSON, as transformers' filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def percent_format(text: Any, *args: Any, **kwargs: Any) -> str:
    """Return a text with the arguments in place of its percent signs."""
    return str(text) % (kwargs or args)


def raise_exception(message: object) -> None:
    """End the rendering, as transformers' function does."""
    raise TemplateError(str(message))


def date_now(form: str) -> str:
    """Return today's date in a format.

    Raises:
        SecurityError: the format has the time of day.
    """
    if not DATE_FORMAT.fullmatch(form):
        raise SecurityError("Chat templates may print dates, but not the time of day.")
    return datetime.now().strftime(form)  # noqa: DTZ005 - as transformers prints it
