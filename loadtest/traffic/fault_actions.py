"""Causes the faults of a schedule at their times, and records what was done."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil

from loadtest.connection import Address
from loadtest.simulated_server import SimulatedServer, Simulation
from loadtest.traffic.faults import Fault, FaultName, PlannedFault, occurrences
from loadtest.traffic.slow_clients import slow_clients
from service.errors import ServerStartError

VICTIMS: dict[FaultName, str] = {
    "kill_replica": "replica",
    "freeze_replica": "replica",
    "kill_proxy": "proxy",
    "kill_controller": "controller",
    "kill_raylet": "raylet",
}
"""The part of the server that a fault hits."""


@dataclass(frozen=True, slots=True)
class CausedFault:
    """A fault that was caused."""

    at_s: float
    """Seconds from the begin of the test."""

    fault: FaultName
    detail: str
    """What it hit; or why it was not caused."""


class FaultInjector:
    """Causes faults.

    Args:
        address: to which slow clients connect.
        server: whose processes are killed; None: it was not started by this command.
        simulation: that the server runs, and that an update replaces by itself with another replica name.
        seed: of the choice between several replicas.
    """

    def __init__(
        self, address: Address, server: SimulatedServer | None, simulation: Simulation | None, seed: int
    ) -> None:
        self.caused: list[CausedFault] = []
        self._address = address
        self._server = server
        self._simulation = simulation
        self._random = random.Random(seed)  # noqa: S311 - a choice between replicas, not a secret
        self._updates = 0

    async def follow(self, schedule: Sequence[Fault]) -> None:
        """Cause the faults at their times; returns after the last one, and never where one repeats."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for planned in occurrences(schedule):
                await asyncio.sleep(max(0.0, began + planned.at_s - time.monotonic()))
                group.create_task(self._record(planned, began))

    async def _record(self, planned: PlannedFault, began: float) -> None:
        at_s = time.monotonic() - began
        detail = await self._cause(planned.fault)
        self.caused.append(CausedFault(at_s, planned.fault.fault, detail))

    async def _cause(self, fault: Fault) -> str:
        if fault.fault == "slow_clients":
            return await self._send_slowly(fault.connections, fault.for_s)
        if fault.fault == "rolling_update":
            return await asyncio.to_thread(self._update)
        victims = await asyncio.to_thread(self._victims, fault.fault)
        if not victims:
            return "no such process ran"
        if fault.fault == "freeze_replica":
            return await _freeze(victims[0], fault.for_s)
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        return f"{len(victims)} process{'es' if len(victims) > 1 else ''} killed"

    async def _send_slowly(self, connections: int, seconds: float) -> str:
        try:
            async with slow_clients(self._address, connections) as held:
                await asyncio.sleep(seconds)
        except OSError as error:
            return str(error)
        return f"{connections} connections for {seconds:g} s, of which the server closed {held.closed_by_server}"

    def _victims(self, fault: FaultName) -> list[psutil.Process]:
        """Return one replica, or all processes of another part."""
        processes = [] if self._server is None else self._server.processes(VICTIMS[fault])
        return [self._random.choice(processes)] if processes and VICTIMS[fault] == "replica" else processes

    def _update(self) -> str:
        """Deploy the same application with another limit, which replaces every replica."""
        if self._server is None or self._simulation is None:
            return "no server to update"
        self._updates += 1
        settings = {**self._simulation.settings, "model": {"engine": "oracle", "name": f"oracle-{self._updates}"}}
        try:
            self._server.redeploy(replace(self._simulation, settings=settings))
        except ServerStartError as error:
            return str(error)
        return "deployed"


async def _freeze(process: psutil.Process, seconds: float) -> str:
    """Stop a process and continue it later, as a machine without memory or a paused container would."""
    os.kill(process.pid, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)
        return f"frozen for {seconds:g} s"
    return "frozen, and replaced meanwhile"
