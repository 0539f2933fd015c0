"""Send mutated requests to a server of this machine: no fault, no hang, no growth, and the next good one is answered.

    python tests/fuzz_soak.py --inputs 100000 --runtime local

Starts ``reward-serve`` with the oracle, whose reward is a known function of the text, so that every good request in
between is checked. The last line of the output is JSON; the exit status is 1 where a bound is exceeded.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import psutil
from mutations import CANARY, mutated_requests
from raw_http import RawAnswer, RawConnection
from serving import RunningServer, serving

from service.engines.oracle import oracle_reward_of_text

HANG_S = 5.0
MAX_GROWTH_BYTES = 10_000_000
NUM_CONNECTIONS = 4
GOOD_EVERY = 200
GOOD_ITEM = {"prompt": "the next ", "completion": "good request"}


@dataclass
class Tally:
    """What came back; filled by several threads, each in its own."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Requests that got a 5xx which the service does not mean, a hang, or their own text back; as their numbers."""
    num_good: int = 0
    slowest_s: float = 0.0


def fuzz(url: str, seed: int, count: int, tally: Tally) -> None:
    """Send mutated requests over one connection, one after the other, and a good one after every few."""
    connection = RawConnection(url, HANG_S)
    for number, request in enumerate(mutated_requests(seed, count)):
        begin = time.monotonic()
        try:
            answer = connection.ask(request, is_head=request.startswith(b"HEAD "))
        except TimeoutError:
            tally.faults.append(f"{seed}:{number} hangs")
            connection.close()
            continue
        except ConnectionError:
            answer = RawAnswer(0)
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - begin)
        tally.statuses[answer.status] += 1
        if answer.is_fault:
            tally.faults.append(f"{seed}:{number} status {answer.status}")
        if CANARY.encode() in answer.body:
            tally.faults.append(f"{seed}:{number} text in the answer")
        if number % GOOD_EVERY == 0:
            ask_good(connection, tally, f"{seed}:{number}")
    connection.close()


def ask_good(connection: RawConnection, tally: Tally, name: str) -> None:
    """Send a request whose reward is known."""
    body = json.dumps({"items": [GOOD_ITEM]}).encode()
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    answer = connection.ask(head.encode() + body)
    results = json.loads(answer.body)["results"] if answer.status == 200 else []
    if [result["reward"] for result in results] != [oracle_reward_of_text(**GOOD_ITEM)]:
        tally.faults.append(f"{name} the next good request got status {answer.status}")
    tally.num_good += 1


def run(url: str, seed: int, count: int) -> Tally:
    """Send ``count`` mutated requests over several connections at once."""
    tallies = [Tally() for _ in range(NUM_CONNECTIONS)]
    with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
        runs = [
            threads.submit(fuzz, url, seed + index, count // NUM_CONNECTIONS, tally)
            for index, tally in enumerate(tallies)
        ]
        for run_of_thread in runs:
            run_of_thread.result()
    return Tally(
        sum((tally.statuses for tally in tallies), Counter()),
        [fault for tally in tallies for fault in tally.faults],
        sum(tally.num_good for tally in tallies),
        max(tally.slowest_s for tally in tallies),
    )


def resident_bytes(server: RunningServer) -> int:
    """Resident memory of the server's processes, the least of a few readings."""
    readings = []
    for _ in range(5):
        processes = [psutil.Process(server.process.pid), *server.descendants()]
        readings.append(sum(process.memory_info().rss for process in processes))
        time.sleep(0.5)
    return min(readings)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="mutated requests")
    parser.add_argument("--warm-up", type=int, default=20_000, help="mutated requests before memory is measured")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runtime", choices=("local", "ray"), default="local")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "requests.jsonl")
        options = ("--engine", "oracle", "--log", str(log))
        with serving(Path(folder), *options, runtime=arguments.runtime) as server:
            run(server.url, arguments.seed + 1000, arguments.warm_up)
            before = resident_bytes(server)
            begin = time.monotonic()
            tally = run(server.url, arguments.seed, arguments.inputs)
            seconds = time.monotonic() - begin
            gc.collect()
            growth = resident_bytes(server) - before
        leaks = sum(CANARY.encode() in file.read_bytes() for file in Path(folder).iterdir())
    report = {
        "inputs": sum(tally.statuses.values()),
        "statuses": dict(sorted(tally.statuses.items())),
        "faults": len(tally.faults),
        "first_faults": tally.faults[:10],
        "good_requests": tally.num_good,
        "slowest_s": round(tally.slowest_s, 3),
        "growth_bytes": growth,
        "files_with_user_text": leaks,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(report))
    return int(bool(tally.faults) or leaks > 0 or growth > MAX_GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
