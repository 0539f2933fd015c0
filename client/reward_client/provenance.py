"""Where a reward model comes from: the checkpoint that its training started at, as its manifest tells.

Reinforcement learning keeps its policy near a reference by a KL penalty, and a reward model knows what models like its
own starting point write. Where the two are different checkpoints, the penalty holds the policy in one place and the
rewards are trustworthy in another; so a client may ask whether they are the same. Standard library alone: trainers and
the client use it too.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST_FILE = "training.json"
"""What a training run leaves beside its model; ``base`` and ``base_hash`` are read here."""

_HASH = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that a reward model was initialised from.

    ``weights_sha256``: over its weights (see ``weights_hash``); None where the training run could not read them.
    """

    name: str
    weights_sha256: str | None


@dataclass(frozen=True, slots=True)
class ReferenceCheck:
    """Whether a checkpoint that somebody names is the one that the served model was initialised from.

    ``same``: None where that cannot be known. ``detail``: why, in one sentence.
    """

    asked: str
    same: bool | None
    detail: str


def read_origin(folder: Path) -> Origin | None:
    """Return what the manifest in a checkpoint folder says of its base; None where there is no readable one."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    base = manifest.get("base") if isinstance(manifest, dict) else None
    if not isinstance(base, str) or not base:
        return None
    base_hash = manifest.get("base_hash")
    # A folder on the trainer's machine is nobody else's business; its last part is how people call the checkpoint.
    name = Path(base).name if Path(base).is_absolute() else base
    return Origin(name, base_hash if isinstance(base_hash, str) else None)


def check_reference(origin: Origin | None, asked: str) -> ReferenceCheck:
    """Compare a reference with a model's origin.

    Args:
        origin: of the served model; None where it is not known.
        asked: a hash over weights (at least its first 8 hexadecimal digits, lower case), or else a name, which is
            compared with the origin's as a whole and with its last part.
    """
    if origin is None:
        return ReferenceCheck(
            asked, None, "The served model brings no manifest that names what it was initialised from."
        )
    if _HASH.fullmatch(asked):
        if origin.weights_sha256 is None:
            return ReferenceCheck(asked, None, f"The served model's manifest names {origin.name}, but not its hash.")
        return _verdict(origin, asked, same=origin.weights_sha256.startswith(asked))
    return _verdict(origin, asked, same=asked.rstrip("/") in {origin.name, origin.name.rsplit("/", 1)[-1]})


def weights_hash(folder: Path) -> str | None:
    """Return the SHA-256 over a checkpoint folder's weights; None where it holds no safetensors files.

    It is the SHA-256 of the files' own hashes, as hexadecimal digits one after another, in the order of their names.
    """
    hashes = [_file_hash(file) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def _verdict(origin: Origin, asked: str, *, same: bool) -> ReferenceCheck:
    known = origin.name if origin.weights_sha256 is None else f"{origin.name} (weights {origin.weights_sha256[:12]})"
    if same:
        return ReferenceCheck(asked, True, f"The served model was initialised from {known}.")
    return ReferenceCheck(asked, False, f"The served model was initialised from {known}, which is another checkpoint.")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
