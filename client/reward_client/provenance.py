"""The base of a reward model: the checkpoint that its training started from, as its training manifest names it.

Reinforcement learning keeps its policy close to a reference model by a KL penalty. A reward model is most reliable on
texts like those of its own base. If reference and base are different checkpoints, the penalty keeps the policy close to
one kind of text and the rewards are reliable for another, so a client may compare the two. This module needs the
standard library alone, because trainers and the client use it too.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from reward_client.hashing import file_sha256

TRAINING_MANIFEST_FILE = "training.json"
"""The manifest that a training run writes next to its model; its entries ``base`` and ``base_hash`` are read here."""

_HASH = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that a reward model was initialised from."""

    name: str
    """Hub id, requirement or folder name of the base."""

    base_hash: str | None
    """Hash over the base's weights (see ``base_hash``); None where the training run could not read them."""


@dataclass(frozen=True, slots=True)
class ReferenceCheck:
    """Whether a given reference checkpoint is the one that the served model was initialised from."""

    asked: str
    """The name or hash of the reference, as the client sent it."""

    same: bool | None
    """None where it cannot be determined."""

    detail: str
    """The reason, in one sentence."""


def read_origin(folder: Path) -> Origin | None:
    """Return the base that the training manifest in a checkpoint folder names; None without a readable manifest."""
    try:
        manifest = json.loads((folder / TRAINING_MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    base = manifest.get("base") if isinstance(manifest, dict) else None
    if not isinstance(base, str) or not base:
        return None
    recorded_hash = manifest.get("base_hash")
    # The folders of the trainer's machine are not published; the last part of a path is the checkpoint's usual name.
    name = Path(base).name if Path(base).is_absolute() else base
    return Origin(name, recorded_hash if isinstance(recorded_hash, str) else None)


def check_reference(origin: Origin | None, asked: str) -> ReferenceCheck:
    """Compare a reference with a model's origin.

    Args:
        origin: origin of the served model; None where it is unknown.
        asked: a hash over weights (at least its first 8 hexadecimal digits, lower case), or else a name, which is
            compared with the origin's full name and with its last part.
    """
    if origin is None:
        return ReferenceCheck(
            asked, None, "The served model has no training manifest that names what it was initialised from."
        )
    if _HASH.fullmatch(asked):
        if origin.base_hash is None:
            return ReferenceCheck(
                asked, None, f"The served model's training manifest names {origin.name}, but not its hash."
            )
        return _comparison(origin, asked, same=origin.base_hash.startswith(asked))
    return _comparison(origin, asked, same=asked.rstrip("/") in {origin.name, origin.name.rsplit("/", 1)[-1]})


def base_hash(folder: Path) -> str | None:
    """Return the hash over a checkpoint folder's weights that training manifests record as ``base_hash``.

    It is the SHA-256 of the SHA-256 values of all ``*.safetensors`` files in the folder, written as hexadecimal digits
    one after another, in the order of the file names. The service's weights sha256 (``Hashes.weights``) is another
    value: it covers the file names too, and only the files that the classifier is loaded from.

    Returns:
        Hexadecimal digits, or None where the folder holds no safetensors files.
    """
    hashes = [file_sha256(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def _comparison(origin: Origin, asked: str, *, same: bool) -> ReferenceCheck:
    base = origin.name if origin.base_hash is None else f"{origin.name} (base hash {origin.base_hash[:12]})"
    if same:
        return ReferenceCheck(asked, True, f"The served model was initialised from {base}.")
    return ReferenceCheck(asked, False, f"The served model was initialised from {base}, which is another checkpoint.")
