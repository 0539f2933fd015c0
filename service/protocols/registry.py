"""The compatibility protocols by name."""

from __future__ import annotations

from service.protocols import kserve, llamafactory, openrlhf, sglang, slime, tei, vllm
from service.protocols.base import Protocol
from service.settings import PROTOCOL_NAMES, ProtocolName, ProtocolSettings

_ALL: dict[ProtocolName, Protocol] = {
    module.PROTOCOL.name: module.PROTOCOL for module in (openrlhf, vllm, llamafactory, slime, kserve, sglang, tei)
}

PROTOCOLS = tuple(_ALL[name] for name in PROTOCOL_NAMES if name in _ALL)
"""All protocols, in the order of their documentation."""


def enabled_protocols(settings: ProtocolSettings) -> tuple[Protocol, ...]:
    """Return the protocols that the settings enable."""
    return tuple(protocol for protocol in PROTOCOLS if protocol.name in settings.names)
