"""The reference of all settings in docs/operations.md, made from the settings tree.

``python -m service.launch.reference docs/operations.md`` rewrites it in place; a test checks that it is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from service.launch.start_settings import SHORT_OPTIONS, StartSettings
from service.setting_fields import allowed_values, is_section

BEGIN = "<!-- settings: written by python -m service.launch.reference -->"
END = "<!-- end of settings -->"


def settings_reference() -> str:
    """Return one Markdown table per section: setting, short option, default, values, description."""
    single = {name: field for name, field in StartSettings.model_fields.items() if not is_section(field.annotation)}
    parts = [_table("", single)]
    for name, field in StartSettings.model_fields.items():
        section = field.annotation
        if is_section(section):
            title = (section.__doc__ or "").splitlines()[0]
            parts.append(f"`{name}`: {title}\n\n{_table(f'{name}.', section.model_fields)}")
    return "\n\n".join(parts)


def with_reference(page: str) -> str:
    """Return a page whose text between the two marks is the reference."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{settings_reference()}\n\n{END}{after}"


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    return "\n".join(
        ["| setting | short option | default | values | meaning |", "|---|---|---|---|---|", *_rows(prefix, fields)]
    )


def _rows(prefix: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    for name, field in fields.items():
        short = SHORT_OPTIONS.get(prefix + name)
        meaning = (field.description or "").replace("|", "\\|")
        facts = [f"`{prefix}{name}`", f"`{short}`" if short else "", f"`{_yaml(field.default)}`", allowed_values(field)]
        yield f"| {' | '.join([*facts, meaning])} |"


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    """Rewrite the reference in the page that the command line names."""
    page = Path(sys.argv[1])
    page.write_text(with_reference(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
