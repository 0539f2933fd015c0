"""Overload of the event loop, simulated: requests advance in turns, and the gate sees what a real loop shows it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from service.scheduling.request_gate import MIN_LAG_S, USED_SHARE, RequestGate

STEPS = 5
"""Turns of the loop that a request takes."""
STEP_S = 0.0004
SPEED = 1 / (STEPS * STEP_S)
"""Requests a second that the loop can handle."""
REFUSAL_S = 0.00006
BEAT_S = 0.05


@dataclass
class Outcomes:
    """Times of arrival by what became of the requests."""

    in_time: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)

    def per_second(self, begin: float, end: float) -> float:
        return sum(begin <= at < end for at in self.in_time) / (end - begin)


def simulate(loads: list[tuple[float, float]], timeout_s: float, *, gated: bool = True) -> Outcomes:
    """Send single requests in a Poisson process to a loop, with or without the gate.

    Args:
        loads: seconds, and arrivals as a multiple of ``SPEED``, one phase after the other.
        timeout_s: the deadline of each request.
        gated: whether the gate decides.
    """
    chance = random.Random(3)
    arrivals: list[float] = []
    end = 0.0
    for seconds, load in loads:
        at = end + chance.expovariate(load * SPEED)
        end += seconds
        while at < end:
            arrivals.append(at)
            at += chance.expovariate(load * SPEED)
    gate, outcomes = RequestGate(), Outcomes()
    steps_left: dict[int, int] = {}
    now = lag_s = busy_s = 0.0
    due, began, num_finished, number = BEAT_S, 0.0, 0, 0
    while number < len(arrivals) or steps_left:
        if not steps_left and now < arrivals[number]:
            now = arrivals[number]
        turn_began = now
        overdue_s = max(0.0, now - due)
        if overdue_s or now >= due:
            lag_s = overdue_s
            gate.record(num_finished, elapsed_s=now - began, cpu_s=busy_s, lag_s=lag_s)
            due, began, num_finished, busy_s = now + BEAT_S, now, 0, 0.0
        ready = list(steps_left)
        while number < len(arrivals) and arrivals[number] <= turn_began:  # later ones are seen in the next turn
            late_s = max(lag_s, now - due)
            patience = gate.longest_timeout_s(now)
            if gated and patience and gate.excess_s(len(steps_left), late_s, patience):
                outcomes.refused.append(arrivals[number])
                now += REFUSAL_S
            else:
                steps_left[number] = STEPS
            number += 1
        for request in ready:
            now += STEP_S
            steps_left[request] -= 1
            if steps_left[request] == STEPS - 1:
                gate.note_timeout(timeout_s, now)
            if not steps_left[request]:
                del steps_left[request]
                num_finished += 1
                is_late = now - arrivals[request] > timeout_s
                (outcomes.late if is_late else outcomes.in_time).append(arrivals[request])
        now += 1e-5
        busy_s += now - turn_began
    return outcomes


@pytest.mark.parametrize("timeout_s", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("load", [2.0, 3.0])
def test_overload_of_the_loop_is_shed(load: float, timeout_s: float) -> None:
    """At 2 and 3 times the loop's speed nine tenths of what it can do beside refusing is answered in time."""
    outcomes = simulate([(2.0, 0.5), (10.0, load)], timeout_s)
    possible = SPEED * (1 - load * SPEED * REFUSAL_S) / (1 - SPEED * REFUSAL_S)
    assert outcomes.per_second(3.0, 12.0 - timeout_s) >= 0.9 * possible
    assert len(outcomes.late) <= 0.05 * len(outcomes.in_time)  # most of them while the load rises


def test_without_the_gate_overload_collapses() -> None:
    """The negative control: the same load without the gate has hardly an answer in time."""
    outcomes = simulate([(2.0, 0.5), (10.0, 2.0)], 1.0, gated=False)
    assert outcomes.per_second(6.0, 12.0) <= 0.1 * SPEED


def test_the_loop_recovers_at_once() -> None:
    """When the load falls from 3 times the speed to 0.8, all requests are answered in time from a second later on."""
    outcomes = simulate([(2.0, 0.5), (6.0, 3.0), (6.0, 0.8)], 1.0)
    assert not [at for at in outcomes.late + outcomes.refused if at >= 9.0]


def test_a_burst_of_patient_requests_is_read() -> None:
    """Trainers send thousands of requests at once with deadlines of minutes: none is refused."""
    outcomes = simulate([(2.0, 0.5), (0.5, 20.0)], 600.0)
    assert not outcomes.refused
    assert not outcomes.late


def test_nothing_is_refused_below_the_speed() -> None:
    """At 80 percent of the speed every request is answered in time."""
    outcomes = simulate([(10.0, 0.8)], 1.0)
    assert not outcomes.refused
    assert not outcomes.late


def test_an_unknown_speed_or_an_idle_loop_refuses_nothing() -> None:
    """Without a measured speed, or where the loop is not late, any number of requests may wait."""
    gate = RequestGate()
    assert gate.excess_s(10_000, 1.0, 0.1) == 0
    gate.record(100, elapsed_s=1.0, cpu_s=1.0, lag_s=0.0)
    assert gate.requests_per_s == pytest.approx(100)
    assert gate.excess_s(10_000, MIN_LAG_S / 2, 0.1) == 0
    assert gate.excess_s(99, 0.5, 2.0) == pytest.approx(1.5 - 2.0 * USED_SHARE)


def test_deadlines_are_forgotten() -> None:
    """The longest deadline of the last seconds counts: a patient caller who has left does not keep the gate open."""
    gate = RequestGate()
    gate.note_timeout(600.0, 100.0)
    for second in range(101, 111):
        gate.note_timeout(1.0, float(second))
    assert gate.longest_timeout_s(111.0) == 1.0
    assert gate.longest_timeout_s(200.0) is None
