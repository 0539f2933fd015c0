"""Open the page of the service in the browser of the user's desktop."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Mapping


def has_desktop(platform: str, environment: Mapping[str, str]) -> bool:
    """Whether a browser can be shown. Without a desktop, Python would start a browser for text in the terminal."""
    if platform in {"darwin", "win32"}:
        return True
    return any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def open_in_browser(url: str) -> bool:
    """Open the address without waiting for the browser; return whether there is one."""
    if not has_desktop(sys.platform, os.environ):
        return False
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    # Some browsers return when they are closed.
    threading.Thread(target=browser.open, args=[url], daemon=True, name="browser").start()
    return True
