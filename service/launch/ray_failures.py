"""What the start command says when Ray does not start the server: sentences for Ray's own messages. Pure."""

from __future__ import annotations

import re

_BUSY = "the machine is too busy or short of memory; start again when it has less to do"
_REASONS = (
    (
        r"no space left on device|errno 28",
        "The disk is full: free some space where the temporary folder lies, or set TMPDIR to another one.",
    ),
    (
        r"cannot bind|could not bind|unable to bind|failed to bind|address already in use|in use by another",
        "Another process took a port while the server started: start again, and choose another --port if it persists.",
    ),
    (
        r"out of memory|outofmemory|\boom\b|cannot allocate memory",
        "The memory of this machine does not suffice: stop other processes, or take fewer replicas.",
    ),
    (
        r"timed out|time-?out|not available after|did not take over|deadline exceeded",
        f"A part of Ray did not start in time: {_BUSY}.",
    ),
    (
        r"ray\.kill|actor.{0,40}(died|dead|unavailable)|worker.{0,40}(died|crashed)|killed|sigkill|sigterm",
        f"A process of Ray ended while the server started: {_BUSY}.",
    ),
    (
        r"raylet|gcs|node (died|is dead)|connection refused|unavailable",
        f"A part of Ray did not answer while the server started: {_BUSY}.",
    ),
)


def explain_failure(message: str) -> str:
    """Return the sentence for a failure that Ray reports while it starts, before any part of the model is loaded."""
    for pattern, sentence in _REASONS:
        if re.search(pattern, message, re.IGNORECASE):
            return sentence
    kind = message.strip().partition(":")[0].split(".")[-1]
    named = f" ({kind})" if kind.isidentifier() else ""
    return f"Ray could not start the server{named}: start again, and report the log if it persists."


def is_of_ray(message: str) -> bool:
    """Whether a failure while replicas load the model is Ray's: a fresh start may get past it."""
    return (
        re.search(
            r"ray\.kill|ActorDied|ActorUnavailable|RaySystemError|NodeDied|WorkerCrashed|LocalRayletDied|"
            r"not available after|failed to bind",
            message,
        )
        is not None
    )
