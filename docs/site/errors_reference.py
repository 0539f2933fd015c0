"""The reference of errors, from the tree of exceptions."""

from __future__ import annotations

from collections.abc import Iterator

from reward_client.errors import ClientError

from docs.site.markdown import anchor, page, sentence, table
from service.errors import HttpError, StartupError

TROUBLESHOOTING = "../troubleshooting.md"


def coded_errors() -> list[type[HttpError]]:
    """Return the classes of errors that are sent, one for each code, by status and code."""
    classes = [one for one in _descendants(HttpError) if "code" in vars(one) or one.__name__ == "InternalError"]
    return sorted(classes, key=lambda one: (one.status, one.code))


def errors_reference() -> str:
    """Return the page."""
    introduction = (
        "A refused request is answered with an [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problem, whose "
        "`code` is one of these. An item that fails alone has the same code in its `error`, while the other items have "
        "rewards. *Retryable*: the same request may succeed later, unchanged; the client sends it again. "
        f"[Troubleshooting]({TROUBLESHOOTING}) says what to do about each."
    )
    sent = table(
        ("code", "status", "retryable", "meaning"),
        [
            (
                f"[`{one.code}`]({TROUBLESHOOTING}#{anchor(one.code)})",
                str(one.status),
                "yes" if one.retryable else "no",
                sentence(one.__doc__),
            )
            for one in coded_errors()
        ],
    )
    start = (
        "A command ends with one sentence and status 1. The sentence names the remedy; the kinds are classes of "
        "`service/errors.py`."
    )
    return page(
        "Errors",
        introduction,
        sent,
        "## Of commands",
        start,
        _kinds(StartupError),
        "## Of the client",
        "Exceptions of `reward_client.errors`, raised in the caller's process ([client](client.md)).",
        _kinds(ClientError),
    )


def _kinds(base: type[Exception]) -> str:
    rows = [(f"`{one.__name__}`", sentence(one.__doc__)) for one in _descendants(base)]
    return table(("class", "meaning"), rows)


def _descendants(base: type[Exception]) -> Iterator[type]:
    for one in base.__subclasses__():
        if one.__module__.startswith(("service.errors", "reward_client.errors")):
            yield one
            yield from _descendants(one)
