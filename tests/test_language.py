"""Identifiers use the terms of the glossary: a synonym that it rules out is found and named."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
PACKAGES = ("service", "scoring", "export", "training", "loadtest", "monitoring", "client/reward_client")


def banned_synonyms(glossary: str) -> dict[str, str]:
    """Return the term to use for each banned word; words are lower case, with underscores, and may end in ``*``."""
    found: dict[str, str] = {}
    for line in glossary.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[0] != "term" and not set(cells[0]) <= {"-"}:
            found |= {word.strip(): cells[0] for word in cells[2].split(",") if word.strip()}
    return found


def pattern_of(synonyms: dict[str, str]) -> re.Pattern[str]:
    """Match a synonym as whole words of a name in snake case."""
    words = "|".join(re.escape(word).replace(r"\*", "[a-z]*") for word in synonyms)
    return re.compile(rf"(?:^|_)({words})(?=_|$)")


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def synonyms_in(name: str, pattern: re.Pattern[str]) -> list[str]:
    return pattern.findall(snake_case(name).replace("in_flight", "inflight"))  # "in-flight" is a standard term


def python_names(source: str) -> Iterator[str]:
    """Yield every name of a Python file, attributes and keyword arguments included."""
    ast.parse(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return (token.string for token in tokens if token.type == tokenize.NAME)


def cpp_names(source: str) -> Iterator[str]:
    """Yield every word of a C++ file outside of comments and strings."""
    code = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', " ", source, flags=re.DOTALL)
    return iter(re.findall(r"[A-Za-z_]\w*", code))


def names_of(path: Path) -> set[str]:
    read = python_names if path.suffix == ".py" else cpp_names
    return {path.stem, *read(path.read_text(encoding="utf-8"))}


def source_files() -> list[Path]:
    return [
        path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*"))
        if path.suffix in {".py", ".cpp", ".h"}
    ]


def test_no_identifier_uses_a_banned_synonym() -> None:
    """Names of modules, classes, functions, variables and macros keep to one word for one meaning."""
    synonyms = banned_synonyms(GLOSSARY.read_text(encoding="utf-8"))
    pattern = pattern_of(synonyms)

    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in source_files()
        for name in sorted(names_of(path))
        if synonyms_in(name, pattern)
    ]

    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("query_borders", ["borders"]),
        ("KeptPrefixes", ["kept"]),
        ("judging_panel", ["judging"]),
        ("_Flight", ["flight"]),
        ("most_in_flight", []),
        ("keep_freed_memory", []),
        ("skeptical", []),
    ],
)
def test_synonyms_are_found_as_whole_words(name: str, expected: list[str]) -> None:
    """Camel case and snake case are split, forms of a word count, and other words that contain it do not."""
    pattern = pattern_of(
        {"border*": "cu_seqlens", "kept": "cached", "judg*": "validation", "flight": "in-flight batch"}
    )

    assert synonyms_in(name, pattern) == expected


def test_the_glossary_rules_words_out() -> None:
    """The table is read: words with their forms, and the term that replaces them."""
    synonyms = banned_synonyms(GLOSSARY.read_text(encoding="utf-8"))

    assert synonyms["border*"] == "`cu_seqlens`"
    assert synonyms["kept"] == "prefix cache"
    assert len(synonyms) > 15
