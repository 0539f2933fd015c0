"""``reward-serve --open``: the browser of the desktop gets the address, and where there is none a sentence says so."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from service.launch.browser import has_desktop
from service.launch.command import main
from service.launch.options import parse_options
from service.launch.progress import TerminalProgress

OPEN = """
import time
from service.launch.browser import open_in_browser
assert open_in_browser("http://a:1")
time.sleep(1)  # for the thread that runs it
"""


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ""}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("linux", {"BROWSER": "firefox"}, True),
        ("darwin", {}, True),
    ],
)
def test_a_desktop_is_known_by_its_variables(platform: str, environment: dict[str, str], expected: bool) -> None:
    """On Linux a browser needs a display, or a command that the user has named; other systems have a desktop."""
    assert has_desktop(platform, environment) == expected


def test_the_browser_gets_the_address(tmp_path: Path) -> None:
    """The command in BROWSER is run with the address."""
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)

    environment = {"BROWSER": f"{browser} %s", "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", OPEN], env=environment, check=True)

    assert (tmp_path / "opened").read_text() == "http://a:1\n"


@pytest.mark.parametrize("opens_page", [True, False])
def test_without_a_desktop_the_address_is_named(monkeypatch: pytest.MonkeyPatch, opens_page: bool) -> None:
    """The message of a start says what is served and where; with --open and no desktop also that nothing was opened."""
    monkeypatch.setattr("service.launch.browser.has_desktop", lambda *_: False)
    output = io.StringIO()

    TerminalProgress(Console(file=output, width=200), "http://a:1", opens_page=opens_page).ready("demo, version 1")

    lines = output.getvalue().splitlines()
    assert lines[0].endswith("s: http://a:1 serves demo, version 1.")
    assert ("There is no desktop here: open http://a:1 in a browser." in lines) == opens_page


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_printed_request_has_the_key(needs_key: bool) -> None:
    """Where requests need a key, the request to paste sends that of the variable REWARD_API_KEY."""
    output = io.StringIO()

    TerminalProgress(Console(file=output, width=200), "http://a:1", needs_key=needs_key).ready("demo, version 1")

    sent = ' -H "Authorization: Bearer $REWARD_API_KEY"' if needs_key else ""
    assert f"curl -s http://a:1/v1/score{sent} -H 'Content-Type: application/json' -d " in output.getvalue()


def test_what_contradicts_open_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A start that serves nothing, or has no page, cannot open it; each gets one sentence."""
    assert parse_options(["--open"]).opens_page
    assert not parse_options([]).opens_page
    with pytest.raises(SystemExit):
        parse_options(["--open", "--check", "demo"])
    assert main(["--engine", "oracle", "--open", "--no-page.enabled"]) == 1
    assert "page.enabled is false, so there is no page: leave --open out." in capsys.readouterr().err
