"""Pages that are made from code: ``python -m docs.site.generated`` writes them; a test checks that they are current.

They are committed, so that they can be read without the site, and so that the site is built without the packages of
the service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from docs.site.commands_reference import commands_reference
from docs.site.decisions_index import decisions_index
from docs.site.errors_reference import errors_reference
from docs.site.markdown import page
from docs.site.metrics_reference import metrics_reference
from docs.site.wire_reference import wire_reference
from service.launch.reference import settings_reference

DOCS = Path(__file__).parents[1]


def settings_page() -> str:
    """Return the page of settings."""
    return page(
        "Settings",
        "A setting is an option of `reward-serve` under its full name (`--limits.deadline_s 60`) and, where there is "
        "one, under its short name; a variable (`REWARD_LIMITS__DEADLINE_S=60`); and a key of the configuration file. "
        "[Configuration](../operations.md#configuration) has the precedence.",
        settings_reference(),
    )


PAGES: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "reference/commands.md": commands_reference,
        "reference/settings.md": settings_page,
        "reference/wire-format.md": wire_reference,
        "reference/errors.md": errors_reference,
        "reference/metrics.md": metrics_reference,
        "decisions/README.md": decisions_index,
    }
)
"""The function that makes each page, by the path of the page in ``docs/``."""


def main() -> None:
    """Write all pages."""
    for path, make in PAGES.items():
        (DOCS / path).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
