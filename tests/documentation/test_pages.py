"""The pages say what the code does: generated pages are current, links lead somewhere, commands have their options."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from documented_blocks import (
    DOCS,
    LANGUAGES,
    REASONS,
    RUN,
    STARTS_A_SERVER,
    TESTED,
    Block,
    command_lines,
    is_same_output,
    read_blocks,
)
from first_steps import ROOT

from docs.site.errors_reference import coded_errors
from docs.site.generated import PAGES
from docs.site.pages import DeadLinksError, collect, site_paths
from service.commands import EXTRAS
from service.launch.sources import read_sources

MARKDOWN = sorted({*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("client/*.md"), *ROOT.glob("examples/*/*.md")})
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", PAGES)
def test_a_generated_page_is_current(path: str) -> None:
    """`python -m docs.site.generated` would change nothing."""
    assert (DOCS / path).read_text(encoding="utf-8") == PAGES[path]()


def test_every_code_of_an_error_is_explained() -> None:
    """Troubleshooting has a section for each code that is sent, and none for a code that is not."""
    sections = re.findall(r"^### (\w+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)

    assert sorted(sections) == sorted(error.code for error in coded_errors())


def test_links_of_the_pages_lead_to_files() -> None:
    """Each relative link of a page, and of the pages that it links to outside of docs/, leads to a file."""
    paths = site_paths(ROOT)

    assert paths["docs/quickstart.md"] == "quickstart.md"
    assert paths["CONTRIBUTING.md"] == "repository/CONTRIBUTING.md"


def test_a_dead_link_is_refused(tmp_path: Path) -> None:
    """A link to a file that does not exist is an error that names page and link; one in a code block is no link."""
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("[a](missing.md) and [b](https://example.org)\n\n```\n[c](other.md)\n```\n")

    with pytest.raises(DeadLinksError, match=r"docs/page\.md: missing\.md$"):
        collect(tmp_path, tmp_path / "site")


def test_links_out_of_docs_are_rewritten(tmp_path: Path) -> None:
    """A file outside of docs/ that a page links to is part of the site, and links in both directions lead there."""
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "sub" / "page.md").write_text("[readme](../../tool/README.md#use) [folder](../sub/)\n")
    (tmp_path / "docs" / "sub" / "README.md").write_text("[up](../../tool/data.json)\n")
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "README.md").write_text("[back](../docs/sub/page.md)\n")
    (tmp_path / "tool" / "data.json").write_text("{}")

    names = collect(tmp_path, tmp_path / "site")

    assert names == ["repository/tool/README.md", "repository/tool/data.json", "sub/README.md", "sub/page.md"]
    page = (tmp_path / "site" / "sub" / "page.md").read_text()
    assert page == "[readme](../repository/tool/README.md#use) [folder](README.md)\n"
    assert (tmp_path / "site/repository/tool/README.md").read_text() == "[back](../../sub/page.md)\n"


@pytest.mark.parametrize("page", TESTED, ids=lambda page: page.name)
def test_blocks_of_a_tested_page_have_known_languages_and_markers(page: Path) -> None:
    """No block is left out of the run by a misspelt marker or language."""
    for block in read_blocks(page):
        where = f"{block.page}:{block.line}"
        assert block.language in LANGUAGES, where
        assert block.marker is None or block.language in RUN, where
        if block.marker is not None and block.marker != STARTS_A_SERVER:
            assert REASONS.fullmatch(block.marker.removeprefix("not run: ")), where


def _documented_commands() -> list[tuple[Block, list[str]]]:
    return [
        (block, words)
        for page in MARKDOWN
        for block in read_blocks(page)
        if block.language in {"", "sh"}
        for words in command_lines(block.text)
    ]


def is_accepted(name: str, arguments: list[str]) -> bool:
    """Whether a command takes these arguments; an option such as --list, which prints something, ends it with 0."""
    try:
        if name == "reward-serve":
            read_sources(arguments)
        else:
            import_module(EXTRAS[name][0]).command_parser().parse(arguments)
    except SystemExit as end:
        return not end.code
    return True


def test_documented_commands_have_their_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each reward-* command of any page is accepted by its own parser, and reward-serve's settings are valid."""
    monkeypatch.chdir(tmp_path)
    for block in (block for page in MARKDOWN for block in read_blocks(page) if block.title):
        (tmp_path / str(block.title)).write_text(block.text)
    checked = set()
    for block, (name, *arguments) in _documented_commands():
        if name in EXTRAS:
            assert is_accepted(name, arguments), f"{block.page}:{block.line}: {name} {' '.join(arguments)}"
            checked.add(name)

    assert checked >= EXTRAS.keys() - {"reward-completion"}


def test_documented_modules_and_targets_exist() -> None:
    """Each `python -m` module and each `make` target of any page exists."""
    modules, targets = set(), set()
    for block, words in _documented_commands():
        if words[0] in {"python", "python3"} and "-m" in words:
            module = words[words.index("-m") + 1]
            if module.partition(".")[0] in {"loadtest", "service", "training", "monitoring", "examples", "docs"}:
                assert find_spec(module), f"{block.page}:{block.line}"
                modules.add(module)
        elif words[0] == "make":
            named = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(named) <= TARGETS, f"{block.page}:{block.line}"
            targets.update(named)

    assert len(modules) > 5
    assert targets >= {"serve", "test", "docs"}


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("reward 0.25, flagged True", "reward -1.5e-3, flagged True", True),
        ("reward 0.25, flagged True", "reward 0.25, flagged False", False),
        ('{"a": 1, ...}', '{"a":2,"b":[3,4]}', True),
        ('{"a": 1}', '{"a":2,"b":3}', False),
        ("1 row", "one row", False),
    ],
)
def test_outputs_are_compared_by_words(expected: str, printed: str, same: bool) -> None:
    """Words must be equal, numbers may differ, an ellipsis is anything."""
    assert is_same_output(expected, printed) is same
