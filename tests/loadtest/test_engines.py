"""The engine comparison on a tiny model: plan, work, ways, figures, and the whole command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from launching_engine import LaunchingOracle

from loadtest import engine_rounds, matmul_limit
from loadtest.contenders import (
    LIMIT,
    REFERENCE,
    Contender,
    Outcome,
    Setup,
    Way,
    limit,
    ours,
    padded_batches,
    plain,
    score_in_batches,
)
from loadtest.device_busy import covered
from loadtest.engine_report import Finding, Measurement, as_data, draw_plot, findings, speed_ups, table
from loadtest.engine_rounds import plan_steps, run_rounds
from loadtest.engine_work import Work, read_groups, tokenize
from loadtest.matmul_limit import layer_shapes, measure_limit
from loadtest.measuring_process import ContenderFailedError
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint
from loadtest.reward_comparison import RewardComparison, compare_rewards
from loadtest.workload import PANDALM_COMPLETIONS, PANDALM_PROMPTS, WORKLOADS, draw_groups
from service.checkpoints.checkpoint import Checkpoint, open_checkpoint
from service.engines.oracle import oracle_reward
from service.errors import DatasetError
from service.records import TokenSequence
from service.settings import ModelSettings

TINY = ModelShape(vocabulary=1200, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, positions=4096)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("engines") / "tiny", TINY, "float32")
    return open_checkpoint(folder, ModelSettings())


@pytest.fixture(scope="module")
def setup(checkpoint: Checkpoint) -> Setup:
    return Setup(
        folder=checkpoint.path,
        device="cpu",
        dtype="float32",
        pad_token_id=checkpoint.pad_token_id,
        max_input_tokens=checkpoint.max_input_tokens,
        max_batch_tokens=512,
        padded_items=4,
        num_threads=torch.get_num_threads(),
    )


def measured(way: str, round_: int, seconds: float, num_computed: int = 100) -> Measurement:
    return Measurement("work", way, round_, seconds, 10, 100, num_computed, limit_tokens_per_s=1000.0)


# --- Plan ------------------------------------------------------------------------------------------------------------


def test_every_way_warms_up_uncounted_and_is_first_in_turn() -> None:
    """The limit is first in each round, the way after it alternates, and each way is in each round once."""
    steps = list(plan_steps(["work"], ["a", "b"], num_rounds=2))

    assert [(step.round, step.way) for step in steps] == [
        *((None, way) for way in (REFERENCE, "a", "b")),
        *((0, way) for way in (LIMIT, "a", "b")),
        *((1, way) for way in (LIMIT, "b", "a")),
    ]


def test_padded_batches_have_every_index_once() -> None:
    """They are in order of arrival or by length, and the last batch may be smaller."""
    lengths = [5, 9, 1, 7, 3]

    assert padded_batches(lengths, 2, by_length=False) == [[0, 1], [2, 3], [4]]
    assert padded_batches(lengths, 2, by_length=True) == [[1, 3], [0, 4], [2]]


# --- Work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_reproducible_and_fill_their_groups(name: str) -> None:
    """Equal seeds give equal texts, different seeds different ones; the items are rounded up to whole groups."""
    workload = WORKLOADS[name]

    groups = workload.draw(10, seed=3)

    assert groups == workload.draw(10, seed=3) != workload.draw(10, seed=4)
    assert {len(group.completions) for group in groups} == {workload.group_size}
    assert len(groups) == -(-10 // workload.group_size)


def test_mixed_work_is_longer_than_short_and_shorter_than_long() -> None:
    """The workloads' lengths are as their names say."""
    chars = {
        name: sum(len(group.prompt + group.completions[0]) for group in WORKLOADS[name].draw(99, seed=1))
        for name in ("short", "mixed", "long")
    }

    assert all(2 * shorter < longer for shorter, longer in pairwise(chars.values()))


def test_rows_of_a_file_become_groups(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Items, pairs and conversations are read; a completion above the token limit is counted as refused."""
    turns = [{"role": "user", "content": "read"}, {"role": "user", "content": "on"}]
    rows: list[dict[str, object]] = [
        {"prompt": "new work", "completion": " good day"},
        {"prompt": turns, "chosen": "a", "rejected": "b"},
        {"prompt": "x", "completion": "word " * 5000},
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")

    groups = list(read_groups(tmp_path))
    work = tokenize(groups, checkpoint)

    assert [group.prompt for group in groups] == ["new work", "read\n\non", "x"]
    assert (work.groups, work.num_refused) == ((0, 1, 1), 1)


def test_row_that_is_neither_item_nor_pair_is_refused_by_its_place(tmp_path: Path) -> None:
    """The message names the row and shows none of its text."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "secret"}\n')

    with pytest.raises(DatasetError, match="row 1 has neither") as refused:
        list(read_groups(file))

    assert "secret" not in str(refused.value)


# --- Ways ------------------------------------------------------------------------------------------------------------


def test_all_ways_give_the_rewards_of_the_reference_in_the_order_of_the_work(
    setup: Setup, checkpoint: Checkpoint
) -> None:
    """Batches differ, but rewards are in order and equal up to rounding in fp32."""
    work = tokenize(draw_groups(2, 3, 5, PANDALM_PROMPTS, PANDALM_COMPLETIONS), checkpoint)
    ways: dict[str, Way] = {**plain(setup), **ours(setup)}

    outcomes = {name: way(work) for name, way in ways.items()}

    assert len(ways) >= 5
    for outcome in outcomes.values():
        assert outcome.rewards == pytest.approx(outcomes[REFERENCE].rewards, abs=1e-4)
        assert outcome.seconds > 0


def test_limit_counts_two_operations_for_each_weight_of_the_layers(setup: Setup, checkpoint: Checkpoint) -> None:
    """Attention and feed-forward matrices count, of the last block keys and values alone; embeddings and head not."""
    outcome = limit(setup)[LIMIT](Work((), ()))

    num_weights = (TINY.layers - 1) * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96) + 2 * 64 * 32
    assert outcome.flops_per_token == 2 * num_weights
    assert outcome.limit_tokens_per_s > 0
    assert sum(layer_shapes(checkpoint.path).values()) == 7 * (TINY.layers - 1) + 2


def test_limit_adds_up_the_layers_by_their_count() -> None:
    """With a clock that advances by a second at each call, three layers of two shapes take three seconds."""
    clock = count()

    limit_found = measure_limit({(8, 8): 2, (8, 16): 1}, 6, torch.float32, torch.device("cpu"), lambda: next(clock))

    assert limit_found.tokens_per_s == pytest.approx(2.0)
    assert limit_found.flops_per_token == 2 * (2 * 8 * 8 + 8 * 16)
    assert limit_found.flops_per_s == pytest.approx(2.0 * limit_found.flops_per_token)


def test_limit_takes_the_faster_arithmetic_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a CPU multiplies fp32 faster than bfloat16, fp32 is its limit; a GPU measures its dtype alone."""
    seconds = {torch.bfloat16: 2.0, torch.float32: 1.0}
    monkeypatch.setattr(matmul_limit, "_multiply", lambda _rows, _shape, dtype, *_: seconds[dtype])

    found = [measure_limit({(8, 8): 1}, 6, torch.bfloat16, torch.device(kind)) for kind in ("cpu", "cuda")]

    assert [limit_found.tokens_per_s for limit_found in found] == [6.0, 3.0]


# --- Figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_medians_of_rounds_and_ratios_are_taken_within_a_round() -> None:
    """A hand calculation: two rounds, of which the second was twice as slow for both ways."""
    measurements = [
        measured("base", 0, 1.0),
        measured("ours", 0, 0.5, num_computed=60),
        measured("base", 1, 2.0),
        measured("ours", 1, 1.0, num_computed=60),
    ]
    comparison = compare_rewards([0.0, 1.0], [0.0, 1.5])

    base, ours_found = findings(measurements, {("work", "base"): comparison, ("work", "ours"): comparison}, "base")

    assert (base.ratio, ours_found.ratio) == (1.0, 2.0)
    assert ours_found.tokens_per_s == pytest.approx(150.0)
    assert ours_found.items_per_s == pytest.approx(15.0)
    # Only computed tokens count for the limit: 120 and 60 of 1,000 tokens a second.
    assert ours_found.limit_share == pytest.approx(0.09)


def test_findings_are_printed_written_and_drawn(tmp_path: Path) -> None:
    """Table, JSON and plot have every way."""
    comparison = compare_rewards([0.0, 1.0], [0.0, 1.5])
    measurements = [measured("base", 0, 1.0), measured("ours", 0, 0.5)]
    found = findings(measurements, {("work", "base"): comparison, ("work", "ours"): comparison}, "base")

    draw_plot(found, {"work": 1000.0}, "tiny", tmp_path / "plot.png")

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert table(found, "base").row_count == 2
    assert [one["way"] for one in json.loads(json.dumps(as_data(found, measurements)))["findings"]] == ["base", "ours"]


# --- Processes -------------------------------------------------------------------------------------------------------


def fails_to_load(_: Setup) -> Mapping[str, Way]:
    raise ValueError("no such weights")


def fails_to_score(_: Setup) -> Mapping[str, Way]:
    def refuse(_: Work) -> Outcome:
        raise ValueError("no such kernel")

    return {REFERENCE: refuse}


@pytest.mark.parametrize(
    ("contender", "words"), [(fails_to_load, "no such weights"), (fails_to_score, "no such kernel")]
)
def test_contender_that_fails_ends_the_run_with_its_own_words(contender: Contender, words: str, setup: Setup) -> None:
    """A way that fails ends the measurement with its exception's message."""
    with pytest.raises(ContenderFailedError, match=f"broken: ValueError: {words}") as caught:
        run_rounds({"broken": contender}, setup, {"work": Work((), ())}, 1, lambda *_: None)

    assert caught.value.details.startswith("Traceback")


def counts(_: Setup) -> Mapping[str, Way]:
    """Ways with known rewards, one of which fails on a workload of two sequences."""

    def some(work: Work) -> Outcome:
        if len(work.sequences) > 1:
            raise ValueError("out of memory")
        return Outcome(1.0, (0.0,) * len(work.sequences))

    def score(work: Work) -> Outcome:
        return Outcome(1.0, (0.0,) * len(work.sequences), limit_tokens_per_s=9.0)

    return {REFERENCE: score, LIMIT: score, "base": score, "some": some}


class InProcess:
    """A contender without a process of its own; fails as one in a process does."""

    def __init__(self, contender: Contender, setup: Setup) -> None:
        self._load, self._setup = contender, setup

    def wait_until_loaded(self) -> list[str]:
        with self._failing():
            self._ways = self._load(self._setup)
        return list(self._ways)

    def score(self, way: str, work: Work) -> Outcome:
        with self._failing():
            return self._ways[way](work)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ContenderFailedError(str(error), f"Traceback of {error}") from None


def test_optional_contenders_that_fail_are_left_out_with_their_tracebacks(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One does not load, a way of another fails at its second workload; the rest is measured, after each workload."""
    monkeypatch.setattr(engine_rounds, "running", lambda one, setup, _: nullcontext(InProcess(one, setup)))
    one = TokenSequence((1, 2, 3))
    works = {"small": Work((one,), (0,)), "large": Work((one, one), (0, 0))}
    completed: list[set[str]] = []

    run = run_rounds(
        {"counts": counts, "broken": fails_to_load},
        setup,
        works,
        1,
        lambda *_: None,
        optional=("counts", "broken"),
        completed=lambda run: completed.append({workload for workload, _ in run.limits}),
    )

    assert completed == [{"small"}, {"small", "large"}]
    assert {(found.workload, found.way) for found in run.measurements} == {
        ("small", "base"),
        ("small", "some"),
        ("large", "base"),
    }
    assert run.failures == {"broken": "Traceback of no such weights", "some": "Traceback of out of memory"}


@pytest.mark.slow
def test_command_measures_every_way_and_writes_the_findings(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """The whole command on a tiny model: the rewards of all ways match the reference."""
    command = [
        *(sys.executable, "-m", "loadtest.engines", "--model", str(checkpoint.path), "--dtype", "float32"),
        *("--workloads", "independent", "--items", "8", "--rounds", "1", "--json", str(tmp_path / "found.json")),
    ]

    subprocess.run(command, check=True, timeout=250)

    report = json.loads((tmp_path / "found.json").read_text())
    assert {"plain, one by one", "plain, padded 16", "ours, packed"} <= {one["way"] for one in report["findings"]}
    assert all(one["comparison"]["max_difference"] < 1e-4 for one in report["findings"])
    assert all(one["limit_share"] > 0 for one in report["measurements"])


# --- On a GPU --------------------------------------------------------------------------------------------------------


def test_batches_are_launched_ahead_where_the_engine_can() -> None:
    """The measured loop launches one pass ahead as the service does, and every item gets its own reward."""
    rows = [(60 + place % 60, 7, place) for place in range(200)]
    work = Work(tuple(TokenSequence(row) for row in rows), tuple(range(200)), 0)
    for ahead, most in ((True, 2), (False, 1)):
        engine = LaunchingOracle(max_batch_tokens=90)
        outcome = score_in_batches(engine, work, time.perf_counter, ahead=ahead)
        engine.close()

        assert list(outcome.rewards) == [oracle_reward(row) for row in rows]
        assert engine.max_in_flight == most


def test_speed_ups_are_by_the_last_part_of_a_name() -> None:
    """Each way is compared with the one whose name lacks its last part, in the same workload only."""
    comparison, shared = RewardComparison(4, 0.0, 1.0, 1.0), "ours, packed, shared prefixes"
    speeds = {"ours, packed": 100.0, shared: 250.0, f"{shared}, fp8": 300.0}
    found = [Finding("groups", way, 1.0, speed, 0.5, 1.0, comparison) for way, speed in speeds.items()]
    found += [Finding("alone", shared, 1.0, 100.0, 0.5, 1.0, comparison)]

    assert speed_ups(found) == ["groups: shared prefixes x 2.50, fp8 x 1.20"]


def test_busy_time_counts_overlapping_kernels_once() -> None:
    """Overlapping, adjacent and nested spans count for the length of their union."""
    assert covered([]) == 0
    assert covered([(3, 5), (0, 2), (1, 2.5), (4, 4.5), (5, 6)]) == 2.5 + 3


def test_even_items_have_512_tokens() -> None:
    """Every item of the workload has exactly 512 words."""
    lengths = {
        len(item["prompt"].split()) + len(item["completion"].split())
        for group in WORKLOADS["512 tokens"].draw(20, seed=1)
        for item in group.items
    }

    assert lengths == {512}
