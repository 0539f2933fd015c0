"""Takes the picture of the dashboard: ``python -m docs.dashboard_picture docs/images/dashboard.png --pairs PAIRS``.

It starts the demo model and a Prometheus that scrapes it with the rules of ``monitoring/``, sends a run in which
hacking begins, and lets `monitoring.render` draw the dashboard.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import yaml

from loadtest.hacked_run import DEFAULT_EDITS, HackedRun, edits_named, read_groups, send_run
from loadtest.servers import free_port, running_service
from monitoring import render
from monitoring.dashboard import PATH
from service.arguments import CommandParser, number_between
from service.commands import run_command
from service.errors import ServerStartError, SettingsError

NAME = "python -m docs.dashboard_picture"
EXAMPLES = Path(__file__).parents[1] / "demo" / "examples.jsonl"
RULES = PATH.parent
SCRAPE_S = 2
READY_WITHIN_S = 30.0
BATCH_ITEMS = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(NAME, "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    edits = edits_named(DEFAULT_EDITS)
    run = HackedRun(read_groups(options.pairs), edits, options.clean_s, options.hacked_s, share=0.5)
    serve = ("--runtime", "local", "--monitors.batch_items", str(BATCH_ITEMS), *options.serve)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(options.model)
        with running_service(model, "auto", folder, *serve) as server, prometheus(folder, server.url) as url:
            begin = time.monotonic()
            time.sleep(3 * SCRAPE_S)  # rates need the zeros at which the counters begin
            send_run(server.url, "ppo-7", run)
            time.sleep(3 * SCRAPE_S)
            minutes = (time.monotonic() - begin) / 60
            return render.main([str(options.output), "--url", url, "--minutes", f"{minutes:.2f}"])


@contextmanager
def prometheus(folder: Path, service: str) -> Iterator[str]:
    """Run Prometheus with the rules of ``monitoring/`` until the block ends; yields its address.

    Raises:
        SettingsError: there is no such program.
        ServerStartError: it is not ready in time.
    """
    beside = Path(sys.executable).parent / "prometheus"
    program = shutil.which("prometheus") or (str(beside) if beside.exists() else None)
    if program is None:
        raise SettingsError("There is no command prometheus; make prometheus takes it from Debian's packages.")
    config: dict[str, Any] = yaml.safe_load((RULES / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{SCRAPE_S}s")
    config["rule_files"] = [str(RULES / rules) for rules in config["rule_files"]]
    config["scrape_configs"][0]["scrape_timeout"] = f"{SCRAPE_S}s"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [service.removeprefix("http://")]
    del config["alerting"]
    path, log = folder / "prometheus.yml", folder / "prometheus.log"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - a fixed command
            [*command, f"--web.listen-address={address}"], stdout=output, stderr=output
        )
    try:
        _wait_until_ready(f"http://{address}", log)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(READY_WITHIN_S)


def _wait_until_ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/-/ready", timeout=2.0).status_code == httpx2.codes.OK:
                return
        time.sleep(0.2)
    raise ServerStartError(f"Prometheus is not ready. The end of its log:\n{log.read_text(errors='replace')[-2000:]}")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=NAME,
        description="Take the picture of the dashboard for the documentation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="the picture")
    parser.add_argument("--pairs", type=Path, default=EXAMPLES, help="data of the run, like that of the calibration")
    parser.add_argument("--model", default="demo", help="what is served")
    parser.add_argument("--clean-s", type=number_between(0.0, 3600.0), default=120.0, help="seconds before hacking")
    parser.add_argument("--hacked-s", type=number_between(0.1, 3600.0), default=60.0, help="seconds of growing hacking")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of reward-serve")
    return parser


if __name__ == "__main__":
    sys.exit(main())
