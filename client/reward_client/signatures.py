"""Binds answers to what was asked: a digest of each item, and a signature of the whole answer.

The signature is an HMAC-SHA256 (RFC 2104) under a secret that client and service share and never send, over a number
that is used once, the body that was sent and the body that came back. So nobody between them can invent an answer,
change a reward, or return the answer to another request, not even where they can read everything. The API key would
not do, because every request has it. Client and service share this module.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

NONCE_HEADER = "X-Reward-Nonce"
SIGNATURE_HEADER = "X-Reward-Signature"
NONCE = re.compile(r"[A-Za-z0-9_-]{16,64}")
MIN_KEY_CHARS = 32
"""Characters of the secret; 32 random bytes in hexadecimal have 64."""


def new_nonce() -> str:
    """Return a random number in text form, for one request."""
    return secrets.token_urlsafe(24)


def signature_of(key: bytes, nonce: str, request_body: bytes, answer_body: bytes) -> str:
    """Return the signature of an answer, in hexadecimal.

    Args:
        key: the secret.
        nonce: of the request.
        request_body: as it was sent, before any compression.
        answer_body: as it was sent, before any compression.
    """
    parts = (nonce.encode(), hashlib.sha256(request_body).digest(), hashlib.sha256(answer_body).digest())
    return hmac.new(key, b"\n".join(parts), "sha256").hexdigest()


def is_signature_of(signature: str | None, key: bytes, nonce: str, request_body: bytes, answer_body: bytes) -> bool:
    """Whether an answer has its signature; takes the same time for every wrong one."""
    expected = signature_of(key, nonce, request_body, answer_body)
    return signature is not None and hmac.compare_digest(signature.encode(), expected.encode())


def item_digest(item: bytes) -> str:
    """Return the SHA-256 of an item's JSON as it stands in the body of a request, in hexadecimal."""
    return hashlib.sha256(item).hexdigest()
