"""Checks the arguments of a call before anything is sent.

Messages name the argument, its position and what is wanted; of a wrong value they give the type, never the value, which
may be a user's text.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeGuard, TypeVar

from reward_client.errors import InvalidArgument
from reward_client.signatures import MIN_KEY_CHARS

T = TypeVar("T")

_MESSAGE = '{"role": "user", "content": "..."}'
_ASSISTANT_MESSAGE = '{"role": "assistant", "content": "..."}'


def positive_seconds(value: object, name: str) -> float:
    """Return a number of seconds as a float.

    Raises:
        InvalidArgument: it is no number, not finite, or not above zero.
    """
    seconds = _finite(value)
    if seconds is None or seconds <= 0:
        raise InvalidArgument(f"{name} must be a finite number of seconds above 0{_shown(value)}")
    return seconds


def seconds_from_zero(value: object, name: str) -> float:
    """Return a number of seconds that may be zero, as a float.

    Raises:
        InvalidArgument: it is no number, not finite, or negative.
    """
    seconds = _finite(value)
    if seconds is None or seconds < 0:
        raise InvalidArgument(f"{name} must be a finite number of seconds of at least 0{_shown(value)}")
    return seconds


def positive_integer(value: object, name: str) -> int:
    """Return a count of at least one.

    Raises:
        InvalidArgument: it is no integer, or below one.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise InvalidArgument(f"{name} must be an integer of at least 1{_shown(value)}")
    return int(value)


def check_pessimism(pessimism: object, diagnostics: object) -> float | None:
    """Return a number of standard deviations as a float; None where there is none.

    Raises:
        InvalidArgument: it is no number, not finite or negative, or the level of diagnostics is not ``full``.
    """
    if pessimism is None:
        return None
    number = _finite(pessimism)
    if number is None or number < 0:
        raise InvalidArgument(
            f"pessimism must be a finite number of standard deviations of at least 0{_shown(pessimism)}"
        )
    if diagnostics != "full":
        raise InvalidArgument('pessimism needs diagnostics="full": what it takes off is computed from hidden states')
    return number


def check_weights(weights: object) -> dict[str, float] | None:
    """Return the weights of named rewards as floats; None where there are none.

    Raises:
        InvalidArgument: it is no dictionary, it is empty, a name is no string, or a weight is no finite number.
    """
    if weights is None:
        return None
    wanted = 'weights must be a dictionary such as {"helpfulness": 0.7, "safety": 0.3}'
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise InvalidArgument(f"{wanted}{_found(weights)}")
    if not weights:
        raise InvalidArgument(f"{wanted}; it is empty")
    checked = {}
    for name, weight in weights.items():
        number = _finite(weight)
        if number is None:
            raise InvalidArgument(f"Each of weights must be a finite number{_shown(weight)}")
        checked[name] = number
    return checked


def one_of(value: object, name: str, choices: Collection[str]) -> None:
    """Check an option that may be None.

    Raises:
        InvalidArgument: it is neither None nor one of the choices.
    """
    if value is not None and not (isinstance(value, str) and value in choices):
        raise InvalidArgument(f"{name} must be one of {', '.join(choices)}, or None")


def instance_of(kind: type[T], value: object, name: str) -> T:
    """Return a value of the given class.

    Raises:
        InvalidArgument: it is of another one.
    """
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name} must be a {kind.__name__}{_found(value)}")
    return value


def elements(values: object, name: str, noun: str, hint: str = "") -> list[Any]:
    """Return the elements of a list, tuple, one-dimensional array, column of a table or generator.

    Args:
        values: what the caller passed.
        name: of the argument.
        noun: what the elements are, in the plural.
        hint: appended to the message for a string.

    Raises:
        InvalidArgument: it is a string, which would be taken as a list of its characters, bytes, a mapping, a set, a
            table or array of more dimensions, or nothing that has elements.
    """
    if isinstance(values, str):
        raise InvalidArgument(f"{name} must be a list of {noun}, not one string{hint}")
    unordered = isinstance(values, bytes | bytearray | memoryview | Mapping | set | frozenset)
    if unordered or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise InvalidArgument(f"{name} must be a list of {noun}{_found(values)}")
    return list(values)


def check_prompt(prompt: object, name: str) -> None:
    """Check that a prompt is a string or a list of messages; what is in a message is left to the service.

    Raises:
        InvalidArgument: it is something else.
    """
    if isinstance(prompt, str):
        return
    if not is_list(prompt):
        raise InvalidArgument(f"{name} must be a string or a list of messages such as {_MESSAGE}{_found(prompt)}")
    messages = list(prompt)
    if not messages:
        raise InvalidArgument(f"{name} is an empty list; a conversation needs at least one message")
    _check_messages(messages, name, _MESSAGE)


def check_completion(completion: object, name: str) -> None:
    """Check that a completion is a string or a list of messages, of which the first is an assistant's.

    Raises:
        InvalidArgument: it is something else.
    """
    if isinstance(completion, str):
        return
    wanted = f"must be a string or a list of messages that begins with one such as {_ASSISTANT_MESSAGE}"
    if not is_list(completion):
        raise InvalidArgument(f"{name} {wanted}{_found(completion)}")
    messages = list(completion)
    _check_messages(messages, name, _ASSISTANT_MESSAGE)
    if not messages or messages[0].get("role") != "assistant":
        found = "its first message has another role" if messages else "it is an empty list"
        raise InvalidArgument(f"{name} {wanted}; {found}")


def _check_messages(messages: list[Any], name: str, example: str) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
            raise InvalidArgument(f"{name}[{index}] must be a message such as {example}{_found(message)}")


def check_items(items: list[Any]) -> None:
    """Check that items are objects of the wire format; which fields they have is left to the service.

    Raises:
        InvalidArgument: one is something else; gives its index.
    """
    for index, item in enumerate(items):
        if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
            wanted = 'a dictionary such as {"prompt": "...", "completion": "..."}'
            raise InvalidArgument(f"items[{index}] must be {wanted}{_found(item)}")


def headers_with_key(headers: Mapping[str, str], api_key: object, of_environment: str | None) -> dict[str, str]:
    """Return the headers of every request with the API key, which is sent as a Bearer token.

    Args:
        headers: checked.
        api_key: as the caller gave it; None: that of the environment.
        of_environment: used where the caller gives neither a key nor an Authorization.

    Raises:
        InvalidArgument: the key is no string of visible ASCII characters, or there is an Authorization beside it.
    """
    has_authorization = any(name.lower() == "authorization" for name in headers)
    if api_key is None:
        if has_authorization or not of_environment:
            return dict(headers)
        api_key = of_environment
    elif has_authorization:
        raise InvalidArgument("api_key and an Authorization in headers exclude each other: give one of them")
    if not isinstance(api_key, str) or not re.fullmatch(r"[!-~]+", api_key):
        raise InvalidArgument("api_key must be a string of visible ASCII characters")
    return {**headers, "Authorization": f"Bearer {api_key}"}


def check_headers(headers: object) -> dict[str, str]:
    """Return the headers of every request.

    Raises:
        InvalidArgument: they are no mapping of names to values that HTTP can carry; gives names, never values.
    """
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise InvalidArgument(f'headers must be a dictionary such as {{"X-Run-Id": "ppo-7"}}{_found(headers)}')
    for name, value in headers.items():
        if not isinstance(name, str) or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise InvalidArgument("The name of a header must be a string of letters, digits, - and _")
        if not isinstance(value, str) or not value.isascii() or not (value.isprintable() and value == value.strip()):
            raise InvalidArgument(f"The header {name} must be a string of printable ASCII characters{_found(value)}")
    return dict(headers)


def is_list(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether a value has elements in an order and is no string."""
    unordered = isinstance(value, str | bytes | bytearray | memoryview | Mapping | set | frozenset)
    return isinstance(value, Iterable) and not unordered


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def _shown(value: object) -> str:
    """What was passed for a number: the number, or the type of anything else."""
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**9):
        return f"; it is {value}"
    return _found(value)


def _found(value: object) -> str:
    """What was passed instead: the type alone, because the value may be a user's text."""
    return "; it is None" if value is None else f"; it is of type {type(value).__name__}"


def check_answer_key(key: object) -> bytes:
    """Return the secret by which answers are signed as bytes; empty where there is none.

    Raises:
        InvalidArgument: it is no string, or shorter than the service's can be.
    """
    if key is None:
        return b""
    if not isinstance(key, str) or len(key.strip()) < MIN_KEY_CHARS:
        raise InvalidArgument(f"answer_key must be a string of at least {MIN_KEY_CHARS} characters")
    return key.strip().encode()
