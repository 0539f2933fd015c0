"""Collects the pages of the site in one folder: those of ``docs/``, and the files elsewhere that they link to.

``python -m docs.site.pages FOLDER`` makes the folder that ``mkdocs.yml`` names. A page keeps its path below ``docs/``;
a file of the repository that a page links to gets its own path below ``repository/``. Links are rewritten accordingly,
so that the sources work on a host of repositories too, and the generator needs no plugin of ours.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
DOCS = "docs"
OUTSIDE = "repository"
INDEX = "README.md"
SUFFIXES = (".md", ".png", ".svg", ".html", ".json", ".js", ".css")
"""Of files in ``docs/`` that are part of the site."""

_LINK = re.compile(r"(?<=\]\()([^()\s#]+)(#[^()\s]*)?(?=\))")
_FENCE = re.compile(r"^\s*(```|~~~)")
_ELSEWHERE = re.compile(r"[a-z]+:|/")


class DeadLinksError(Exception):
    """Some links lead to files that do not exist; the message names each page and link."""


def collect(root: Path, folder: Path) -> list[str]:
    """Write the pages to a new folder and return their paths in it.

    Args:
        root: of the repository.
        folder: replaced if it exists.

    Raises:
        DeadLinksError: pages link to files that do not exist.
    """
    paths = site_paths(root)
    if folder.exists():
        shutil.rmtree(folder)
    for source, target in paths.items():
        out = folder / target
        out.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            out.write_text(_rewritten((root / source).read_text(encoding="utf-8"), source, paths), encoding="utf-8")
        else:
            shutil.copyfile(root / source, out)
    return sorted(paths.values())


def site_paths(root: Path) -> dict[str, str]:
    """Return the path in the site of each file that is part of it, by its path in the repository.

    Raises:
        DeadLinksError: pages link to files that do not exist.
    """
    waiting = [
        path.relative_to(root).as_posix()
        for path in sorted((root / DOCS).rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    ]
    found: dict[str, str] = {}
    dead: list[str] = []
    while waiting:
        source = waiting.pop()
        if source in found:
            continue
        found[source] = source.removeprefix(f"{DOCS}/") if source.startswith(f"{DOCS}/") else f"{OUTSIDE}/{source}"
        if source.endswith(".md"):
            for link in _links((root / source).read_text(encoding="utf-8")):
                target = _target(source, link)
                if (root / target).is_file():
                    waiting.append(target)
                else:
                    dead.append(f"{source}: {link}")
    if dead:
        raise DeadLinksError("Links lead to files that do not exist: " + "; ".join(sorted(dead)))
    return found


def _links(text: str) -> Iterator[str]:
    """Yield the relative links of a page, without the part behind ``#``."""
    for line in _outside_of_blocks(text):
        for match in _LINK.finditer(line):
            if not _ELSEWHERE.match(match[1]):
                yield match[1]


def _outside_of_blocks(text: str) -> Iterator[str]:
    in_block = False
    for line in text.splitlines():
        if _FENCE.match(line):
            in_block = not in_block
        elif not in_block:
            yield line


def _target(source: str, link: str) -> str:
    """Return the path in the repository that a link means; a folder stands for its index."""
    path = os.path.normpath(PurePosixPath(source).parent / link)
    return f"{path}/{INDEX}" if link.endswith("/") else path


def _rewritten(text: str, source: str, paths: dict[str, str]) -> str:
    """Return a page whose links lead from its path in the site to those of their targets."""
    folder = PurePosixPath(paths[source]).parent

    def rewritten(match: re.Match[str]) -> str:
        if _ELSEWHERE.match(match[1]):
            return match[0]
        target = os.path.relpath(paths[_target(source, match[1])], folder)
        return target + (match[2] or "")

    lines, in_block = [], False
    for line in text.splitlines():
        if _FENCE.match(line):
            in_block = not in_block
        lines.append(line if in_block else _LINK.sub(rewritten, line))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the folder that the command line names."""
    paths = collect(ROOT, Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {len(paths)} files")


if __name__ == "__main__":
    main()
