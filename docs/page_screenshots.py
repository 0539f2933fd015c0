"""Photograph the page of a running service for the documentation: ``python docs/page_screenshots.py URL FOLDER``.

It needs Chromium and Playwright, and scores two examples.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
LIVE_MS = 16_000
"""Until the charts of the live view have some readings."""
WAIT_MS = 120_000
"""For an answer of a slow model."""


def main(url: str, folder: Path) -> None:
    """Write the pictures to the folder."""
    executable = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if executable is None:
        sys.exit("page_screenshots: There is no Chromium on this machine.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            _photograph_example(browser, url, folder / f"page-{scheme}.png", 1200, dark=scheme == "dark")
        _photograph_example(browser, url, folder / "page-phone.png", 360, dark=False)
        _photograph_live(browser, url, folder / "page-live.png")
        browser.close()


def _photograph_example(browser: Browser, url: str, path: Path, width: int, *, dark: bool) -> None:
    page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light")
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    page.get_by_role("button", name="Flattery", exact=True).click()
    page.locator(".reward").nth(1).wait_for()
    page.get_by_label("Change completion A").get_by_role("button", name="hedge").click()
    page.locator(".movement").wait_for()
    page.get_by_label("Completion A", exact=True).first.evaluate("() => document.activeElement.blur()")
    page.screenshot(path=path, full_page=True)
    page.close()


def _photograph_live(browser: Browser, url: str, path: Path) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{url}/#live")
    page.locator("#view-live svg").first.wait_for()
    page.wait_for_timeout(LIVE_MS)
    page.screenshot(path=path, full_page=True)
    page.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/page_screenshots.py URL FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
