"""A newcomer's mistakes: each gets one sentence, at once, with the right exit status, and leaves nothing behind.

The cases are in the TOML files of this folder; a field is a field of ``first_steps.Case``.
"""

from __future__ import annotations

import re
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from first_steps import Case, Outcome, read_cases, run_case, write_world

CASES = read_cases(Path(__file__).parent)
QUICK = [case for case in CASES if not case.needs_model]

LIMIT_S = 2.0
"""Seconds within which a mistake that needs no model is answered, on an idle machine."""

IDLE_VERSION_S = 0.35
"""Seconds of ``--version`` on an idle machine; where it takes longer, the limit is longer in proportion."""

CONCURRENCY = 2

PROGRESS = re.compile(r"^\S+: [\d,]+ rows?\b|^Checking the checkpoint \.\.\.$")
"""Lines that may stand before the sentence: about a file that was read, and a stage of a start."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world_with_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with a checkpoint ``tiny``, its adapter ``lora``, and a base ``qwen-base`` of the same size."""
    from tiny_adapters import write_adapter
    from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint

    folder = write_world(tmp_path_factory.mktemp("world"))
    write_tiny_checkpoint(folder / "tiny")
    write_tiny_causal_lm(folder / "llama-base")
    write_tiny_causal_lm(folder / "qwen-base", "qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a property that transformers has renamed
        write_adapter(folder / "lora", folder / "llama-base")
    return folder


def version_s(world: Path, scratch: Path) -> float:
    """Measure how long the cheapest call of a command takes at this moment."""
    started = time.monotonic()
    run_case(Case("version", "reward-audit", ["--version"], [], status=0), world, scratch)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory):
    """Start the selected cases, two at a time, and return their futures by name."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {one.params["case"].name for one in parameters if one is not None and "case" in one.params}
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        yield {
            case.name: pool.submit(run_case, case, world, tmp_path_factory.mktemp("case"))
            for case in QUICK
            if case.name in selected
        }


def check(case: Case, outcome: Outcome) -> None:
    """Compare what a command did with the answer that its case describes."""
    assert "Traceback" not in outcome.stderr
    assert outcome.status == case.status, outcome.stderr
    *before, sentence = outcome.stderr.strip().splitlines()
    unexpected = [line for line in before if not PROGRESS.search(line)]
    assert case.needs_model or not unexpected, outcome.stderr  # with a model, lines of progress stand before it
    assert sentence.startswith(f"{case.command}: ")
    assert case.needs_model or sentence.endswith(".")
    for part in case.says:
        assert part in sentence
    assert outcome.stdout == ""
    assert outcome.left_behind == []


def test_there_are_enough_cases() -> None:
    """Names are unique, so that every case is run."""
    assert len({case.name for case in CASES}) == len(CASES) >= 80


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_a_mistake_gets_one_sentence_at_once(
    case: Case, outcomes: dict[str, Future[Outcome]], world: Path, tmp_path: Path
) -> None:
    """One sentence that names the remedy, the right status, nothing written, no heavy import, within the limit."""
    outcome = outcomes[case.name].result()

    check(case, outcome)
    assert outcome.loaded == []
    if outcome.wall_s > LIMIT_S:  # the machine may be busy: once more, in CPU time, beside the cheapest call; a lookup
        # of a name waits for the network, which is no work of the command
        again = run_case(case, world, tmp_path / "again")
        slowdown = max(1.0, version_s(world, tmp_path / "version") / IDLE_VERSION_S)
        assert min(again.cpu_s, outcome.cpu_s) < LIMIT_S * slowdown


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in CASES if case.needs_model], ids=lambda case: case.name)
def test_a_mistake_that_needs_a_model_gets_one_sentence(case: Case, world_with_models: Path, tmp_path: Path) -> None:
    """As above, without a time limit: a full disk, adapters of another base."""
    check(case, run_case(case, world_with_models, tmp_path / "case"))
