"""The reference of settings in the documentation."""

from __future__ import annotations

from pathlib import Path

from service.launch.reference import settings_reference, with_reference
from service.launch.start_settings import SETTING_NAMES, SHORT_OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_documented_settings_are_current() -> None:
    """docs/operations.md has the tables that the settings tree gives; the module's command rewrites them."""
    page = PAGE.read_text(encoding="utf-8")

    assert page == with_reference(page)


def test_every_setting_is_in_the_reference() -> None:
    """Each setting has a row with a description, and each short option is there."""
    rows = {line.split("`")[1]: line for line in settings_reference().splitlines() if line.startswith("| `")}

    assert set(rows) == set(SETTING_NAMES)
    assert all(f"`{short}`" in rows[name] for name, short in SHORT_OPTIONS.items())
    assert not any(line.endswith("|  |") for line in rows.values())
