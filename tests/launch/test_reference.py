"""The reference of settings in the documentation."""

from __future__ import annotations

from service.launch.reference import settings_reference
from service.launch.start_settings import SETTING_NAMES, SHORT_OPTIONS


def test_every_setting_is_in_the_reference() -> None:
    """Each setting has a row with a description, and each short option is there."""
    rows = {line.split("`")[1]: line for line in settings_reference().splitlines() if line.startswith("| `")}

    assert set(rows) == set(SETTING_NAMES)
    assert all(f"`{short}`" in rows[name] for name, short in SHORT_OPTIONS.items())
    assert not any(line.endswith("|  |") for line in rows.values())
