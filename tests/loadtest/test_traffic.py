"""The load generator: its schedule, how it counts time, what it finds in answers, and what a fault schedule may say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from misbehaving_server import FakeServer, Request, response, running
from serving import free_port, serving

from loadtest.connection import Address
from loadtest.traffic.arrivals import CONSTANT, Arrivals
from loadtest.traffic.checking import check, oracle_reward_of_item
from loadtest.traffic.command import main
from loadtest.traffic.execution import Exchange, Executor, PhaseRun
from loadtest.traffic.faults import Fault, FaultScheduleError, check_fits, occurrences, read_schedule
from loadtest.traffic.items import EqualItems, WorkloadItems
from loadtest.traffic.latencies import latencies_of
from loadtest.traffic.machine import server_facts
from loadtest.traffic.phases import BurstStream, ClosedStream, OpenStream, Phase, PlannedRequest, RequestPlanner, Stream
from loadtest.traffic.run import cpu_s_since
from loadtest.traffic.scenarios import RECOVERY, NoCapacityError, Scenario
from loadtest.traffic.slow_clients import HeldConnections, slow_clients
from loadtest.traffic.summary import Second, StreamSummary, recovered_after_s, summarize
from loadtest.workload import WORKLOADS
from service.engines.oracle import oracle_reward_of_text
from service.errors import ServerStartError


def planner() -> RequestPlanner:
    return RequestPlanner(EqualItems(64, seed=3), timeout_ms=2000, seed=3)


def rewards_of(items: list[dict[str, str]]) -> list[float]:
    return [oracle_reward_of_text(item["prompt"], item["completion"]) for item in items]


def answer_of(rewards: list[float]) -> bytes:
    results = [{"index": index, "reward": reward} for index, reward in enumerate(rewards)]
    return json.dumps({"model": {"version": "oracle"}, "results": results}).encode()


@pytest.mark.parametrize(("shape", "expected_cv2"), [(1.0, 1.0), (0.25, 4.0), (CONSTANT, 0.0)])
def test_arrivals_have_their_rate_and_burstiness(shape: float, expected_cv2: float) -> None:
    """Gaps have the mean of the rate and the stated squared coefficient of variation; a seed gives equal schedules."""
    arrivals = Arrivals(100.0, shape)
    times = arrivals.times(200.0, seed=1)
    gaps = [after - before for before, after in pairwise(times)]

    assert times == sorted(times) == arrivals.times(200.0, seed=1) != arrivals.times(200.0, seed=2) or shape == CONSTANT
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert statistics.pvariance(gaps) / statistics.fmean(gaps) ** 2 == pytest.approx(expected_cv2, abs=0.1, rel=0.1)


def test_no_two_items_have_one_text() -> None:
    """Items of a workload and of one size all differ, and equal seeds give equal items."""
    for source in (lambda: WorkloadItems(WORKLOADS["groups of 8"], 5), lambda: EqualItems(48, 5)):
        items = source().take(1200)
        assert len({item["prompt"] + item["completion"] for item in items}) == 1200
        assert source().take(1200) == items
    assert {len(item["prompt"] + item["completion"]) for item in EqualItems(48, 5).take(50)} == {48}


def test_schedule_is_ordered_and_repeatable() -> None:
    """The requests of all open streams are merged by their start, within the window of their stream."""
    streams = [OpenStream("a", Arrivals(50.0)), OpenStream("b", Arrivals(50.0), 2, begin_s=1.0)]
    phase = Phase("both", 1.0, streams)

    first, second = planner().schedule(phase, 0), planner().schedule(phase, 0)

    starts = [request.start_s for request in first]
    assert first == second
    assert starts == sorted(starts)
    assert {request.stream for request in first} == {"a", "b"}
    assert all(request.start_s >= 1.0 for request in first if request.stream == "b")
    assert json.loads(first[0].body)["timeout_ms"] == 2000


def test_quantiles_of_a_histogram() -> None:
    """Quantiles are those of the values to 0.1 percent, and the stored histogram holds the same ones."""
    latencies = latencies_of(number / 1000 for number in range(1, 10_001))

    assert latencies.count == 10_000
    assert latencies.quantiles["p50"] == pytest.approx(5.0, rel=2e-3)
    assert latencies.quantiles["p99.9"] == pytest.approx(9.99, rel=2e-3)
    assert latencies.max == pytest.approx(10.0, rel=2e-3)


def test_the_steps_of_an_overload_are_multiples_of_the_capacity() -> None:
    """Rates follow the measured capacity; the last phase falls from the largest factor to 0.8; zero is refused."""
    scenario = Scenario("overload", 5.0, items_per_request=2, factors=(0.5, 3))

    steps = scenario.later_phases(100.0)

    streams = [stream for phase in steps for stream in phase.streams if isinstance(stream, OpenStream)]
    assert [stream.arrivals.rate_per_s for stream in streams] == pytest.approx([25.0, 150.0, 150.0, 40.0])
    assert (streams[-1].name, streams[-1].begin_s) == (RECOVERY, 5.0)
    with pytest.raises(NoCapacityError):
        scenario.later_phases(0.0)


class Stalling(FakeServer):
    """The oracle behind one slow answer: the first request takes 0.3 s."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.number == 0:
            await asyncio.sleep(0.3)
        yield response("200 OK", answer_of(rewards_of(request.body["items"])))


def run_against(server: FakeServer, *streams: Stream, duration_s: float, connections: int = 64) -> PhaseRun:
    """Run one phase against a server of the test and return what happened."""

    async def run(url: str) -> PhaseRun:
        executor = Executor(Address.of(url), give_up_s=5.0, max_connections=connections)
        phase, plan = Phase("phase", duration_s, streams), planner()
        result = await executor.run(phase, plan.schedule(phase, 0), plan)
        executor.close()
        return result

    with running(server) as world:
        return asyncio.run(run(world.url))


def test_a_stalled_server_delays_all_that_should_have_started() -> None:
    """Latency counts from the intended start: what waited behind a stall has it, although its own answer was fast."""
    stream = OpenStream("open", Arrivals(100.0, CONSTANT))
    run = run_against(Stalling(), stream, duration_s=0.2, connections=1)
    (summary,) = summarize(run, within_s=0.25, expected=oracle_reward_of_item)

    assert summary.statuses == {"200": 19}
    assert summary.wrong_items == 0
    assert summary.service_s.quantiles["p50"] < 0.1
    assert summary.latency_s.quantiles["p50"] > 0.15
    assert summary.good_items + summary.late_items == 19
    assert summary.late_items >= 1
    assert summary.send_lag_s.max > 0.15


def test_settled_latencies_leave_out_the_begin_of_a_step() -> None:
    """Requests that start within the time limit of the begin count in the latencies, not in the settled ones."""
    run = run_against(Stalling(), OpenStream("open", Arrivals(50.0, CONSTANT)), duration_s=0.5)
    (summary,) = summarize(run, within_s=0.25, expected=oracle_reward_of_item)

    assert summary.latency_s.count == 24
    assert summary.latency_s.max > 0.29
    assert summary.settled_latency_s.count == 12


class ClosingTwo(FakeServer):
    """Counts connections and closes the first two as soon as they send something."""

    connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        with contextlib.closing(writer):
            await reader.read(1)
            while number > 2 and await reader.read(4096):
                pass


def test_slow_clients_stay_until_they_are_told_to_end() -> None:
    """Five connections are open when the block begins, those that the server closes are replaced, all end with it."""

    async def hold(server: ClosingTwo) -> tuple[int, HeldConnections]:
        async with slow_clients(Address.of(server.url), 5) as held:
            open_at_first = held.open
            for _ in range(600):
                if server.connections == 7:
                    break
                await asyncio.sleep(0.05)
        return open_at_first, held

    with running(ClosingTwo()) as server:
        open_at_first, held = asyncio.run(hold(server))

    assert open_at_first == 5
    assert (held.closed_by_server, held.refused) == (2, 0)
    assert server.connections == 7


def test_slow_clients_that_cannot_connect_are_an_error() -> None:
    """Where nothing listens, the measurement does not begin."""

    async def hold() -> None:
        async with slow_clients(Address("127.0.0.1", free_port()), 2):
            raise AssertionError("nothing is open")

    with pytest.raises(OSError, match="only 0 of 2"):
        asyncio.run(hold())


def test_batches_wait_for_their_slowest_answer() -> None:
    """A burst's completion is that of its last request, and the stall fraction is the waiting part of the loop."""
    run = run_against(Stalling(), BurstStream("ppo", 4, 2, train_s=0.1), duration_s=0.35)
    (summary,) = summarize(run, within_s=1.0, expected=oracle_reward_of_item)

    assert summary.batches is not None
    assert summary.batches.num_batches >= 1
    assert summary.batches.completion_s.max >= 0.3
    assert 0.3 < summary.batches.stall_fraction < 0.95
    assert summary.items == summary.batches.num_batches * 8


def test_requests_without_an_answer_are_counted_by_their_reason() -> None:
    """Refused connections are failures of the requests, not an end of the run."""

    class Closing(FakeServer):
        """Closes each connection without an answer."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield b""

    run = run_against(Closing(), ClosedStream("closed", 2), duration_s=0.1)
    (summary,) = summarize(run, within_s=1.0, expected=oracle_reward_of_item)

    assert set(summary.statuses) == {"no answer"}
    assert summary.codes == {"IncompleteReadError": summary.requests}
    assert summary.good_items == 0


def test_the_time_of_ended_processes_does_not_count() -> None:
    """A process that a fault ended takes its time along, so the difference of sums would be less than what was used."""
    assert cpu_s_since({1: 10.0, 2: 50.0}, {1: 12.5, 3: 1.5}) == 4.0


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_server_that_needs_a_key_is_told(status: str) -> None:
    """The message names the option and the variable for the key."""

    class Guarded(FakeServer):
        """Answers nobody."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield response(status, b"{}")

    with running(Guarded()) as server, pytest.raises(ServerStartError, match=r"--api-key or REWARD_API_KEY"):
        server_facts(server.url, {})


@pytest.mark.parametrize(
    ("content", "status", "wrong", "malformed"),
    [
        ("right", 200, 0, False),
        ("swapped", 200, 2, False),
        ("short", 200, 1, False),
        ("not json", 200, 2, True),
        ('{"code": "overloaded"}', 503, 0, False),
        ("Internal Server Error", 500, 0, True),
    ],
)
def test_wrong_answers_are_found(content: str, status: int, wrong: int, malformed: bool) -> None:
    """A swapped, missing or unreadable answer is wrong; a problem with a code is a refusal."""
    items = EqualItems(40, seed=9).take(2)
    rewards = rewards_of(items)
    known = {"right": answer_of(rewards), "swapped": answer_of(rewards[::-1]), "short": answer_of(rewards[:1])}
    request = PlannedRequest("open", 0.0, items, b"")

    checked = check(
        Exchange(request, 0.0, 0.0, 1.0, status, known.get(content, content.encode())), oracle_reward_of_item
    )

    assert (checked.num_wrong, checked.is_malformed) == (wrong, malformed)


def summary_with(seconds: list[tuple[int, int]]) -> StreamSummary:
    """A summary whose seconds have so many good and refused items."""
    run = run_against(Stalling(), OpenStream("open", Arrivals(10.0, CONSTANT)), duration_s=0.15)
    (summary,) = summarize(run, within_s=1.0, expected=None)
    return replace(summary, seconds=[Second(good=good, refused=refused) for good, refused in seconds])


def test_recovery_is_the_second_from_which_all_is_good() -> None:
    """A later dip counts: recovery is the begin of the good seconds that last to the end."""
    assert recovered_after_s(summary_with([(50, 50), (100, 0), (90, 10), (96, 4), (100, 0)])) == 3.0
    assert recovered_after_s(summary_with([(100, 0), (50, 50)])) is None


def test_fault_schedules(tmp_path: Path) -> None:
    """Repeated faults recur for ever, in the order of time; unknown ones and other people's servers are refused."""
    file = tmp_path / "faults.yaml"
    file.write_text("- {fault: kill_replica, at_s: 8, every_s: 8}\n- {fault: kill_proxy, at_s: 20}\n")
    schedule = read_schedule(file)

    planned = [(one.at_s, one.fault.fault) for one in islice(occurrences(schedule), 4)]

    assert planned == [(8, "kill_replica"), (16, "kill_replica"), (20, "kill_proxy"), (24, "kill_replica")]
    with pytest.raises(FaultScheduleError, match="--start"):
        check_fits(schedule, owns_server=False)
    check_fits([Fault(fault="slow_clients", at_s=1)], owns_server=False)
    file.write_text("- {fault: unplug, at_s: 8}\n")
    with pytest.raises(FaultScheduleError, match="fault"):
        read_schedule(file)


@pytest.mark.slow
def test_command_measures_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An overload of a real server, beside slow clients, is reported as JSON and HTML, and every reward is right."""
    faults = tmp_path / "faults.yaml"
    faults.write_text("- {fault: slow_clients, at_s: 0.5, connections: 20, for_s: 2}\n")
    out = tmp_path / "report"
    with serving(tmp_path, "--engine", "oracle", runtime="local") as server:
        arguments = [
            "--server-pid",
            str(server.process.pid),
            "--scenario",
            "overload",
            "--duration",
            "1.5",
            "--clients",
            "4",
            "--factors",
            "0.3",
            "0.6",
        ]
        status = main(["--url", server.url, *arguments, "--faults", str(faults), "--out", str(out)])

    figures = json.loads((out / "loadtest.json").read_text())
    assert status == 0, capsys.readouterr().err
    assert figures["rewards_known"]
    assert [one["stream"] for one in figures["summaries"][:3]] == ["capacity", "0.3x", "0.6x"]
    assert all(one["good_items"] > 0 and one["wrong_items"] == 0 for one in figures["summaries"][:2])
    assert [one["phase"] for one in figures["costs"]] == ["capacity", "0.3x", "0.6x", "recovery"]
    assert all(0 < one["server_cores"] < 8 and one["generator_cores"] > 0 for one in figures["costs"])
    assert [one["fault"] for one in figures["faults"]] == ["slow_clients"]
    assert "<svg" not in (out / "loadtest.html").read_text()
    assert (out / "loadtest.html").read_text().count("data:image/svg+xml;base64,") == 3
