"""Why pairs have no tokens or no reward, in words that are equal for equal causes, so that they can be counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from service.errors import HttpError, InvalidRequest


def reason_of(code: str, detail: str) -> str:
    """Return the reason of an item's error: its detail where that names no sizes, else the title of its code.

    Args:
        code: of a `service.errors.HttpError`, as the service sends it.
        detail: the description of this occurrence.
    """
    if code == InvalidRequest.code:
        return detail.removesuffix(".")
    return next((error.title for error in _kinds(HttpError) if error.code == code), code)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Return how often each reason occurs, the most frequent one first."""
    return dict(Counter(reasons).most_common())


def describe_reasons(counts: Mapping[str, int]) -> str:
    """Return ``20: The model's chat template rejects these messages (TemplateError)``, joined by semicolons."""
    return "; ".join(f"{count:,}: {reason}" for reason, count in counts.items())


def _kinds(error: type[HttpError]) -> Iterator[type[HttpError]]:
    yield error
    for kind in error.__subclasses__():
        yield from _kinds(kind)
