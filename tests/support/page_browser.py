"""A headless Chromium for tests of the page, and what a page must not do: write errors, ask for anything elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
READY = "#status[data-ready=yes]"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the Chromium of this machine; the test is skipped where there is none."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("needs Chromium, such as Debian's package chromium")
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; the tests load nothing but the page of their own server.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, view: str = "", width: int = 1200, scheme: str = "light") -> Iterator[Page]:
    """Open the page of a server, and check at the end that it had no error and asked for nothing elsewhere."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        service_workers="block",
    )
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else problems.append(request.url))
    page.goto(f"{url}/{view}")
    page.wait_for_selector(READY)
    yield page
    context.close()
    assert problems == []
