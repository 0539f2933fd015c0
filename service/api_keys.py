"""API keys: who may call the service, for what, and how much. The file of keys holds hashes, never a key.

A key is random with 256 bits, so one SHA-256 of it is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from reward_client.signatures import MIN_KEY_CHARS

from service.errors import SettingsError
from service.records import KEY_NAME_PATTERN, KeyScope
from service.settings import Section

KEY_BYTES = 32
"""Random bytes of a new key."""
_PREFIX = "rs_"
"""Of every new key, by which scanners for leaked secrets can find it."""


class ApiKey(Section):
    """One entry of the file of keys."""

    name: str = Field(pattern=KEY_NAME_PATTERN, description="In logs; never secret.")
    scope: KeyScope = "score"
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, in hexadecimal.")
    items_per_minute: int | None = Field(
        None, ge=1, description="Items that a replica scores for the key in a minute; null: no quota."
    )


class ApiKeys:
    """The keys of a service.

    Args:
        keys: with different names and hashes.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all keys."""
        return tuple(key.name for key in self._keys)

    def find(self, presented: str) -> ApiKey | None:
        """Return the entry of a key; None where there is none. The time does not depend on which one it is."""
        digest = hash_of(presented)
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def hash_of(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal, as the file has it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> str:
    """Return a new random key."""
    return _PREFIX + secrets.token_urlsafe(KEY_BYTES)


def read_answer_key(path: str | None) -> bytes:
    """Return the secret that answers are signed with; empty without a file.

    Raises:
        SettingsError: the file cannot be read, or the secret is short.
    """
    if path is None:
        return b""
    try:
        key = Path(path).expanduser().read_bytes().strip()
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise SettingsError(f"security.answer_key: {path} cannot be read ({reason}).") from None
    if len(key) < MIN_KEY_CHARS:
        raise SettingsError(
            f"security.answer_key: {path} has {len(key)} characters; a secret has at least {MIN_KEY_CHARS}, for "
            "example of `openssl rand -hex 32`."
        )
    return key


def read_api_keys(path: str) -> ApiKeys:
    """Read a file of keys: a YAML list of entries.

    Raises:
        SettingsError: it cannot be read, has no key, or an entry is invalid; the message quotes no value.
    """
    try:
        entries = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise SettingsError(f"security.api_keys: {path} cannot be read ({reason}).") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise SettingsError(f"security.api_keys: {path} is not YAML.") from None
    try:
        keys = TypeAdapter(list[ApiKey]).validate_python(entries)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise SettingsError(f"security.api_keys: {path} is not valid at {place}: {first['msg']}.") from None
    if not keys:
        raise SettingsError(f"security.api_keys: {path} has no key; reward-key makes one.")
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if len(set(values)) < len(values):
            raise SettingsError(f"security.api_keys: two entries of {path} have the same {field}.")
    return ApiKeys(keys)
