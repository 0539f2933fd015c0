"""Takes the pictures of the page for the documentation: ``python -m docs.page_screenshots docs/images --pairs PAIRS``.

It starts the demo model, or photographs a service that runs already (``--url``). For the Live view it sends a run in
which hacking begins, and waits until a monitor is in alarm. It needs Chromium and Playwright.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from loadtest.hacked_run import DEFAULT_EDITS, HackedRun, edits_named, read_groups, send_run
from loadtest.servers import running_service
from service.arguments import CommandParser, number_between
from service.commands import run_command
from service.errors import SettingsError

NAME = "python -m docs.page_screenshots"
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
EXAMPLES = Path(__file__).parents[1] / "demo" / "examples.jsonl"
WIDTH = 1200
PHONE_WIDTH = 360
RUN_ID = "ppo-7"
BATCH_ITEMS = 64
"""Items of a batch of the monitors, fewer than by default: the pictures are of some minutes of a small model."""
WAIT_MS = 180_000
"""For an answer of a slow model."""
AFTER_ALARM_MS = 15_000
"""In which more signals follow the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(NAME, "dev", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse(arguments)
    executable = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if executable is None:
        raise SettingsError(f"There is no Chromium on this machine: none of {', '.join(EXECUTABLES)} is a command.")
    edits = edits_named(DEFAULT_EDITS)
    run = HackedRun(read_groups(options.pairs), edits, options.clean_s, options.hacked_s, share=0.8)
    with _service(options.url) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        photograph(browser, url, options.folder, run)
        browser.close()
    return 0


@contextmanager
def _service(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    options = ("--runtime", "local", "--monitors.batch_items", str(BATCH_ITEMS))
    with (
        tempfile.TemporaryDirectory() as logs,
        running_service(Path("demo"), "auto", Path(logs), *options) as server,
    ):
        yield server.url


def photograph(browser: Browser, url: str, folder: Path, run: HackedRun) -> None:
    """Write all pictures to a folder: the playground in light, dark and on a phone, the model, the live view."""
    for scheme in ("light", "dark"):
        with _opened(browser, url, WIDTH, dark=scheme == "dark") as page:
            _photograph_example(page, folder / f"page-{scheme}.png", edit="pad" if scheme == "dark" else None)
    with _opened(browser, url, PHONE_WIDTH) as page:
        _photograph_example(page, folder / "page-phone.png", edit=None)
    with _opened(browser, f"{url}/#model", WIDTH) as page:
        page.locator("#view-model table").first.wait_for()
        _photograph(page, folder / "page-model.png")
    with _opened(browser, f"{url}/#live", WIDTH) as page, _sent(url, run):
        _photograph_live(page, folder / "page-live.png", run)


@contextmanager
def _opened(browser: Browser, address: str, width: int, *, dark: bool = False) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light")
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    page.wait_for_selector("#status[data-ready=yes]")
    yield page
    page.close()


@contextmanager
def _sent(url: str, run: HackedRun) -> Iterator[None]:
    """Send the run beside the block, and for as long as the block may wait; its errors are raised at the end."""
    errors: list[BaseException] = []

    def send() -> None:
        try:
            send_run(url, RUN_ID, run)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]


def _photograph_example(page: Page, path: Path, *, edit: str | None) -> None:
    page.get_by_role("button", name="Flattery", exact=True).click()
    page.locator("[data-caught]").wait_for()
    if edit is not None:
        page.get_by_label("Change completion A").get_by_role("button", name=edit).click()
        page.locator(".movement").wait_for()
    page.mouse.move(0, 0)
    _photograph(page, path)


def _photograph_live(page: Page, path: Path, run: HackedRun) -> None:
    """Photograph the Live view some time after the first alarm since hacking began."""
    page.get_by_label("Name of a run").fill(RUN_ID)
    page.get_by_label("Name of a run").press("Enter")
    page.wait_for_timeout(1000 * run.clean_s)
    page.locator("[data-alarm]").first.wait_for(timeout=1000 * run.hacked_s + WAIT_MS)
    page.wait_for_timeout(AFTER_ALARM_MS)
    _photograph(page, path)


def _photograph(page: Page, path: Path) -> None:
    """Write a picture of the whole page, in a window as high as it, so that what stays at the bottom is there."""
    page.evaluate("document.activeElement.blur()")
    height = page.evaluate("document.documentElement.scrollHeight")
    width = page.evaluate("innerWidth")
    page.set_viewport_size({"width": width, "height": height})
    page.screenshot(path=path)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog=NAME,
        description="Take the pictures of the page for the documentation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--url", help="a service that runs already; without it the demo model is started")
    parser.add_argument("--pairs", type=Path, default=EXAMPLES, help="data of the run, like that of the calibration")
    parser.add_argument("--clean-s", type=number_between(0.0, 3600.0), default=90.0, help="seconds before hacking")
    parser.add_argument("--hacked-s", type=number_between(0.1, 3600.0), default=90.0, help="seconds of growing hacking")
    return parser


if __name__ == "__main__":
    sys.exit(main())
