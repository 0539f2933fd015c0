"""``reward-loadtest``: sends the traffic of a scenario to a running service, and reports what came back and when.

    reward-loadtest --url http://127.0.0.1:8000 --scenario open --rate 50 --out report
    reward-loadtest --start 2 --scenario overload --within 2 --out report
    reward-loadtest --start 2 --scenario closed --duration 60 --faults faults.yaml --out report

Arguments, the fault schedule and the output are checked before anything is started or sent.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from loadtest.traffic.scenarios import Scenario, shape_of
from loadtest.workload import WORKLOADS
from service.arguments import CommandParser, not_empty, number_between, whole_number
from service.commands import run_command
from service.outputs import check_output_folder

API_KEY_VARIABLE = "REWARD_API_KEY"
DESCRIPTION = "Send the traffic of a scenario to a running service, and report what came back and when."
REPORT_ENTRIES = ("loadtest.json", "loadtest.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 after one sentence, or where an answer was wrong or unexplained."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("reward-loadtest", "loadtest", lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    parser = command_parser()
    options = parser.parse(arguments)
    if (options.url is None) == (options.start is None):
        parser.error("give either --url or --start")

    from reward_client.addresses import service_url
    from reward_client.checks import headers_with_key

    from loadtest.traffic.faults import check_fits, read_schedule

    schedule = read_schedule(options.faults) if options.faults is not None else []
    check_fits(schedule, owns_server=options.start is not None)
    if options.url is not None:
        options.url = service_url(options.url)
    options.headers = headers_with_key({}, options.api_key, os.environ.get(API_KEY_VARIABLE))
    if options.out is not None:
        check_output_folder(options.out, overwrite=options.overwrite, entries=REPORT_ENTRIES)

    from loadtest.traffic.run import run

    return run(options, _scenario(options), schedule, _without_key(arguments))


def _scenario(options: Namespace) -> Scenario:
    return Scenario(
        options.scenario,
        options.duration,
        rate_per_s=options.rate,
        shape=shape_of(options.arrivals, options.burstiness),
        items_per_request=options.items,
        clients=options.clients,
        batch_requests=options.batch_requests,
        train_s=options.train,
        bulk_items=options.bulk_items,
        bulk_clients=options.bulk_clients,
        factors=options.factors,
    )


def _without_key(arguments: Sequence[str]) -> list[str]:
    """Return the command line without the value of ``--api-key``."""
    shown, hide_next = list[str](), False
    for argument in arguments:
        name = argument.partition("=")[0]
        shown.append("..." if hide_next else f"{name}=..." if name == "--api-key" and "=" in argument else argument)
        hide_next = argument == "--api-key"
    return shown


def command_parser() -> CommandParser:
    """Return the parser of ``reward-loadtest``."""
    parser = CommandParser(prog="reward-loadtest", description=DESCRIPTION)
    add = parser.add_argument_group("the service").add_argument
    add("--url", type=not_empty, help="root URL of a running service")
    add("--start", type=whole_number(1), metavar="N", help="start a simulated service with N replicas instead")
    add("--server-pid", type=whole_number(1), metavar="PID", help="process of a service on this machine: its CPU time "
        "and that of its descendants are reported")  # fmt: skip
    add("--api-key", type=not_empty, help=f"sent as a Bearer token (default: the variable {API_KEY_VARIABLE})")
    add = parser.add_argument_group("the traffic").add_argument
    add("--scenario", choices=("open", "closed", "ppo", "mixed", "overload"), default="open", help="what is sent")
    seconds = number_between(0.1, 86_400)
    add("--duration", type=seconds, default=10.0, metavar="S", help="of each phase (default: %(default)s)")
    add("--within", dest="within_s", type=seconds, default=2.0, metavar="S", help="time limit of a good answer, and "
        "deadline of each request (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=1, help="of texts and arrival times (default: %(default)s)")
    add = parser.add_argument_group("the report").add_argument
    add("--out", type=Path, metavar="DIR", help="write loadtest.json and loadtest.html")
    add("--overwrite", action="store_true", help="replace an earlier report")
    add = parser.add_argument_group("faults").add_argument
    add("--faults", type=Path, metavar="FILE", help="fault schedule, a YAML list (docs/load-testing.md)")
    _add_requests(parser)
    _add_streams(parser)
    return parser


def _add_requests(parser: CommandParser) -> None:
    group = parser.add_argument_group("requests")
    add = group.add_argument
    add("--items", type=whole_number(1), default=1, help="of each request (default: %(default)s)")
    add("--workload", choices=list(WORKLOADS), default="short", help="lengths of the texts (default: %(default)s)")
    add("--tokens", type=whole_number(32), help="items of exactly so many bytes instead, which are the oracle's tokens")
    add("--connections", type=whole_number(1), default=2048, help="at once (default: %(default)s)")
    add("--new-connections", action="store_true", help="open a connection for each request")
    group = parser.add_argument_group("the service of --start: the oracle engine with a forward pass that sleeps")
    add = group.add_argument
    add("--tokens-per-s", type=number_between(1, 1e9), default=20_000.0, help="of a replica (default: %(default)s)")
    add("--max-batch-tokens", type=whole_number(1), default=1024, help="of a forward pass (default: %(default)s)")


def _add_streams(parser: CommandParser) -> None:
    group = parser.add_argument_group("streams")
    add = group.add_argument
    add("--rate", type=number_between(1e-3, 1e6), default=10.0, metavar="PER_S", help="requests per second of open and "
        "of mixed's small requests (default: %(default)s)")  # fmt: skip
    add("--arrivals", choices=("poisson", "gamma", "constant"), default="poisson", help="of open streams (default: "
        "%(default)s)")  # fmt: skip
    add("--burstiness", type=number_between(0.01, 1000), default=4.0, help="of gamma: squared coefficient of variation "
        "of the gaps; Poisson has 1 (default: %(default)s)")  # fmt: skip
    add("--clients", type=whole_number(1), default=32, help="of closed, and of overload's measurement of the capacity "
        "(default: %(default)s)")  # fmt: skip
    add("--batch-requests", type=whole_number(1), default=64, help="requests of a ppo batch (default: %(default)s)")
    add("--train", type=number_between(0, 86_400), default=1.0, metavar="S", help="seconds between two ppo batches "
        "(default: %(default)s)")  # fmt: skip
    add("--bulk-items", type=whole_number(1), default=64, help="of a request of mixed's bulk clients (default: "
        "%(default)s)")  # fmt: skip
    add("--bulk-clients", type=whole_number(1), default=2, help="of mixed (default: %(default)s)")
    add("--factors", type=number_between(0.01, 1000), nargs="+", default=[0.5, 1, 2, 3, 5, 10], help="of the steps of "
        "overload, multiples of the capacity (default: 0.5 1 2 3 5 10)")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
