"""Bodies over the limits, in every way in which one can be: each is refused, and the replica does not grow."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator

from backports import zstd

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.ledger import keep_ledger
from loadtest.reliability.memory import resident_mb
from loadtest.reliability.options import ExperimentOptions
from loadtest.simulated_server import SimulatedServer, Simulation, simulated_server
from service.settings import LimitSettings

ROUNDS = 20
"""Bodies of each of the five kinds: a hundred in all."""
WARM_UP_ROUNDS = 4
GROWTH_MB = 10.0
READINGS = 6
"""Of the resident memory, half a second apart; the smallest counts."""
REFUSED = 413
PART_BYTES = 1024 * 1024
LIMITS = LimitSettings()
ANSWER_S = 60.0


def oversized_bodies(options: ExperimentOptions) -> list[Finding]:
    """R16: a hundred bodies over the limits, one after the other, after some to warm up."""
    with simulated_server(Simulation(1, 0.0, 65_536), options.runtime) as server:
        asyncio.run(_score(server))
        asyncio.run(_send(server.url, WARM_UP_ROUNDS))
        before = _settled_mb(server)
        statuses = asyncio.run(_send(server.url, ROUNDS))
        growth = _settled_mb(server) - before
        asyncio.run(_score(server))
    return [
        at_least(
            "R16", f"bodies over the limits that were refused ({_listed(statuses)})", statuses[REFUSED], 5 * ROUNDS
        ),
        at_most("R16", "growth of resident memory, MB", growth, GROWTH_MB),
    ]


async def _score(server: SimulatedServer) -> None:
    """Score good items; raises where one fails."""
    ledger = await keep_ledger(server.url, 1000, clients=4, items_per_call=64, item_bytes=128)
    if ledger.lost or ledger.wrong:
        raise AssertionError(f"{ledger.lost} good items were lost and {ledger.wrong} have a wrong reward")


async def _send(url: str, rounds: int) -> Counter[int]:
    """Send bodies of each kind; return the number of answers by status, 0 where there was none."""
    address = Address.of(url)
    large = b"a" * (LIMITS.max_request_bytes + PART_BYTES)
    in_gzip, in_zstd, values = gzip.compress(large, 1), zstd.compress(large), gzip.compress(_many_values(), 1)
    kinds: list[Callable[[], Iterator[bytes]]] = [
        lambda: _announced(len(large)),
        lambda: _in_chunks(large),
        lambda: _compressed(in_gzip, "gzip"),
        lambda: _compressed(in_zstd, "zstd"),
        lambda: _compressed(values, "gzip"),
    ]
    statuses: Counter[int] = Counter()
    for _ in range(rounds):
        for kind in kinds:
            statuses[await _status(address, kind())] += 1
    return statuses


async def _status(address: Address, parts: Iterator[bytes]) -> int:
    """Send the parts of a request until it is answered; return the status."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    answered = asyncio.create_task(reader.readline())
    try:
        async with asyncio.timeout(ANSWER_S):
            for part in parts:
                if answered.done():
                    break
                writer.write(part)
                await writer.drain()
            line = await answered
        return int(line.split()[1]) if line else 0
    except (OSError, TimeoutError):
        return 0
    finally:
        answered.cancel()
        writer.close()


def _head(*lines: str) -> bytes:
    return "\r\n".join(
        ["POST /v1/score HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", ""]
    ).encode()


def _announced(num_bytes: int) -> Iterator[bytes]:
    yield _head(f"Content-Length: {num_bytes}")


def _in_chunks(body: bytes) -> Iterator[bytes]:
    yield _head("Transfer-Encoding: chunked")
    for begin in range(0, len(body), PART_BYTES):
        part = body[begin : begin + PART_BYTES]
        yield f"{len(part):x}\r\n".encode() + part + b"\r\n"
    yield b"0\r\n\r\n"


def _compressed(body: bytes, coding: str) -> Iterator[bytes]:
    yield _head(f"Content-Encoding: {coding}", f"Content-Length: {len(body)}") + body


def _many_values() -> bytes:
    """A body of a few megabytes with more values than are read."""
    ids = [0] * (LIMITS.max_request_values + 1)
    return json.dumps({"items": [{"token_ids": ids}]}, separators=(",", ":")).encode()


def _settled_mb(server: SimulatedServer) -> float:
    readings = []
    for _ in range(READINGS):
        time.sleep(0.5)
        readings.append(resident_mb(server))
    return min(readings)


def _listed(counts: Counter[int]) -> str:
    return ", ".join(f"{count} x {status or 'no answer'}" for status, count in sorted(counts.items()))
