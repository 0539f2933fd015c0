"""The code blocks of Markdown pages: what each is for, and running them as a reader would.

A block in ``sh`` or ``python`` is run, unless a comment in the line before it says otherwise:

- ``<!-- not run: needs a GPU -->``, or another of `REASONS`;
- ``<!-- starts a server -->``: its options are checked, and the server of the test is what it would have started.

A block in ``text`` or ``json`` that follows a block which is run, with nothing in between, is its output: ``...``
stands for anything, a number for any number, and white space does not count. A block with a ``title`` is a file of that
name.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from first_steps import ROOT

from service.commands import EXTRAS

DOCS = ROOT / "docs"
REASONS = re.compile(r"needs a GPU|needs a cluster|needs the network|needs another program \([\w ,-]+\)|takes minutes")
LANGUAGES = frozenset({"sh", "python", "text", "json", "yaml"})
RUN = frozenset({"sh", "python"})
DOCUMENTED_SERVER = "127.0.0.1:8000"

_BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>[^\n]*?) -->\n)?```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?%?"
_PIECE = re.compile(rf"\.\.\.|{_NUMBER}")
STARTS_A_SERVER = "starts a server"


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    title: str | None
    marker: str | None
    text: str

    output: str | None = None
    """Of a block that is run or starts a server: what the page says that it prints."""

    @property
    def is_run(self) -> bool:
        """Whether a reader without a GPU, a cluster or minutes can run it."""
        return self.language in RUN and self.marker is None


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order; an output belongs to the block before it and is none of its own."""
    content = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    end = 0
    for match in _BLOCK.finditer(content):
        follows = bool(blocks) and not content[end : match.start()].strip() and blocks[-1].output is None
        end = match.end()
        line = content.count("\n", 0, match.start()) + 1
        if follows and blocks[-1].language in RUN and match["language"] in {"text", "json"} and not match["title"]:
            last = blocks.pop()
            blocks.append(Block(last.page, last.line, last.language, last.title, last.marker, last.text, match["text"]))
            continue
        name = page.relative_to(ROOT).as_posix()
        blocks.append(Block(name, line, match["language"], match["title"], match["marker"], match["text"]))
    return blocks


def write_commands(folder: Path) -> Path:
    """Write programs that run the commands of the source tree, as ``.venv/bin`` of a clone has them."""
    folder.mkdir()
    programs = {"python": 'exec "$PYTHON" "$@"'}
    for command in EXTRAS:
        call = f"import sys; from service.commands import {command.replace('-', '_')} as run; sys.exit(run())"
        programs[command] = f'exec "$PYTHON" -c "{call}" "$@"'
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


def run_block(block: Block, folder: Path, commands: Path, server: str) -> str:
    """Run a block in a folder and return what it prints; one that fails fails the test.

    Args:
        block: in sh or python.
        folder: the working directory.
        commands: a folder of programs for the search path.
        server: host and port that take the place of `DOCUMENTED_SERVER`.
    """
    text = block.text.replace(DOCUMENTED_SERVER, server)
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "sh" else [sys.executable, "-c", text]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("REWARD_", "HF_"))}
    environment |= {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "client"), str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, f"{block.page}:{block.line}: status {done.returncode}\n{done.stdout}"
    return done.stdout


def check_output(block: Block, printed: str, server: str) -> None:
    """Fail where a block prints something else than its page says."""
    expected = (block.output or "").replace(DOCUMENTED_SERVER, server)
    assert is_same_output(expected, printed), f"{block.page}:{block.line} prints\n{printed}\nnot\n{expected}"


def is_same_output(expected: str, printed: str) -> bool:
    """Whether an output is what a page shows: ``...`` is anything, a number any number, white space nothing."""
    pattern, end = "", 0
    expected, printed = ("".join(text.split()) for text in (expected, printed))
    for match in _PIECE.finditer(expected):
        pattern += re.escape(expected[end : match.start()])
        pattern += ".*?" if match[0] == "..." else _NUMBER
        end = match.end()
    return re.fullmatch(pattern + re.escape(expected[end:]), printed) is not None


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block up to the first pipe or redirection, without variables before them."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.search(r"\[|\.\.\.|^\s*[{}<]", line):  # a synopsis, or no command
            continue
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # a quote that ends on another line
            continue
        ends = [index for index, word in enumerate(words) if set(word) <= set("|&;<>")]
        words = words[: min(ends, default=len(words))]
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


class _SiteLoader(yaml.SafeLoader):
    """Reads the configuration of the site, in which an extension is given as a Python object."""


_SiteLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def navigation() -> dict[str, list[str]]:
    """The paths of the pages of each section of the site."""
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), _SiteLoader)  # noqa: S506 - a SafeLoader
    sections = {name: pages for section in site["nav"] for name, pages in section.items()}
    return {
        name: [path for page in pages for path in ([page] if isinstance(page, str) else page.values())]
        for name, pages in sections.items()
    }


TESTED = [DOCS / "quickstart.md", *(DOCS / path for path in navigation()["How to"])]
"""The pages whose blocks are run."""
