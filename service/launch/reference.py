"""The reference of all settings, from the settings tree: the tables of docs/reference/settings.md."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from service.launch.start_settings import SHORT_OPTIONS, StartSettings
from service.setting_fields import allowed_values, is_section


def settings_reference() -> str:
    """Return one Markdown table per section, under its heading: setting, short option, default, values, description."""
    single = {name: field for name, field in StartSettings.model_fields.items() if not is_section(field.annotation)}
    parts = [_table("", single)]
    for name, field in StartSettings.model_fields.items():
        section = field.annotation
        if is_section(section):
            title = (section.__doc__ or "").splitlines()[0]
            parts.append(f"## {name}\n\n{title}\n\n{_table(f'{name}.', section.model_fields)}")
    return "\n\n".join(parts)


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
