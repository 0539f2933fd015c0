"""Checks whether the KL reference of a training run is the checkpoint that the reward model was initialised from.

Reported once per client by a ReferenceWarning; an error only where the caller requires it.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from reward_client.answers import read_object
from reward_client.errors import BadAnswer, InvalidArgument, ReferenceMismatch, RequestRejected
from reward_client.provenance import ReferenceCheck, base_hash

Reference: TypeAlias = str | os.PathLike[str]
"""A checkpoint folder here, the hash over one's weights, or a name."""


class ReferenceWarning(UserWarning):
    """The KL reference is another checkpoint than the one that the reward model was initialised from, or may be."""


def reference_name(reference: object) -> str:
    """Return the reference as it is sent to the service: the hash over a folder's weights; anything else unchanged.

    Raises:
        InvalidArgument: it is no name or path, or the folder holds no safetensors files.
    """
    if not isinstance(reference, str | os.PathLike) or not str(reference):
        raise InvalidArgument("reference must be a checkpoint folder, a hash over its weights, or a name")
    folder = Path(reference)
    if not folder.is_dir():
        return str(reference)
    name = base_hash(folder)
    if name is None:
        raise InvalidArgument(f"{folder} holds no safetensors files, so it cannot be compared by its weights")
    return name


def reference_route(name: str) -> str:
    """Return the route that compares a reference with what is served."""
    return f"/v1/model?reference={quote(name, safe='')}"


def read_reference_check(content: bytes, name: str) -> ReferenceCheck:
    """Read the comparison out of an answer of ``/v1/model``.

    Raises:
        BadAnswer: not JSON, or a comparison of another shape. Where the service does not answer the question,
            ``same`` is None.
    """
    reported: Any = read_object(content).get("reference")
    if reported is None:
        return ReferenceCheck(name, None, "The service does not compare references.")
    if not isinstance(reported, dict) or reported.get("same") not in (True, False, None):
        raise BadAnswer("The comparison of the reference has another shape than the protocol promises")
    return ReferenceCheck(name, reported["same"], str(reported.get("detail", "No reason was given.")))


def refusal_of_check(name: str, error: RequestRejected | BadAnswer) -> ReferenceCheck:
    """Return the check's result where the service answered it with an error: unknown."""
    return ReferenceCheck(name, None, f"The service did not answer the check ({type(error).__name__}).")


def report_reference_check(check: ReferenceCheck, *, required: bool) -> None:
    """Return where the two are the same; otherwise warn, or raise where ``required``.

    Raises:
        ReferenceMismatch: they are not the same, or it is unknown, and ``required``.
    """
    if check.same:
        return
    claim = "may be another" if check.same is None else "is another"
    message = f"The KL reference {claim} checkpoint than the reward model was initialised from. {check.detail}"
    if required:
        raise ReferenceMismatch(message)
    warnings.warn(message, ReferenceWarning, stacklevel=2)
