"""The ONNX engine feeds graphs rightly, keeps neighbours apart, and never runs where it was not told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bundles import TAPS, change_manifest, embedding, reward_by_hand, write_tiny_bundle

from service.checkpoints.bundle import open_bundle, read_manifest
from service.engines.onnx import (
    Filling,
    OnnxEngine,
    load_onnx_engine,
    open_session,
    passes_over,
    refuse_missing_provider,
    session_options,
    wanted_providers,
)
from service.errors import EngineOutOfMemory, ParityError, SettingsError
from service.records import StateTap, TokenSequence
from service.settings import BatchingSettings, ModelSettings

ROWS = [(9, 4, 30), (77,), (5, 6, 7, 8, 9, 10, 11, 12), (40, 41)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


def load(folder: Path, *, deterministic: bool = False, taps: Any = None, **model: Any) -> OnnxEngine:
    settings = ModelSettings.model_validate({"path": str(folder), "device": "cpu", "num_threads": 1, **model})
    return load_onnx_engine(
        open_bundle(folder, settings), settings, BatchingSettings(deterministic=deterministic), taps=taps
    )


def rewards_of(engine: OnnxEngine, rows: list[tuple[int, ...]]) -> list[float]:
    return list(engine.forward([TokenSequence(row) for row in rows]).rewards)


class _RecordingSession:
    """A session that notes the shapes it is given, and fails as it is told to."""

    def __init__(self, session: Any, failure: Exception | None = None) -> None:
        self._session = session
        self._failure = failure
        self.shapes: list[tuple[int, ...]] = []

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def run(self, names: list[str], feed: dict[str, Any]) -> Any:
        self.shapes.append(feed["input_ids"].shape)
        if self._failure is not None:
            raise self._failure
        return self._session.run(names, feed)


def recorded(engine: OnnxEngine, failure: Exception | None = None) -> _RecordingSession:
    session = _RecordingSession(engine._session, failure)
    engine._session = session
    return session


def test_rewards_are_those_worked_out_by_hand(folder: Path) -> None:
    """Filling, mask and pooled position are right for rows of different lengths, and order is kept."""
    rewards = rewards_of(load(folder), ROWS)

    assert rewards == pytest.approx([reward_by_hand(row) for row in ROWS], abs=1e-5)


def test_info_says_where_and_how_the_graph_runs(folder: Path) -> None:
    """Engine, price, arithmetic, providers and the evidence of the export are there to be shown."""
    info = load(folder).info

    assert (info.engine, info.cost, info.device, info.dtype) == ("onnx", "padded", "cpu", "float32")
    assert info.providers == ("CPUExecutionProvider",)
    assert (info.max_input_tokens, info.max_batch_tokens, info.taps) == (512, 2048, TAPS)
    assert info.parity["spearman"] == 1.0


@pytest.mark.parametrize(("pooling", "pooled"), [("hf", 1), ("last", 3)])
def test_pooling_decides_which_token_is_read(folder: Path, pooling: str, pooled: int) -> None:
    """Under transformers' rule pad tokens at the end are skipped; under the other the last token is read."""
    pad = read_manifest(folder).pad_token_id
    row = (9, 30, pad, pad)

    (reward,) = rewards_of(load(folder, pooling=pooling), [row])

    assert reward == pytest.approx(reward_by_hand(row, pooled), abs=1e-5)


def test_a_head_of_its_own_begins_at_the_first_token() -> None:
    """For encoders that pool by themselves the state of ``last`` is the first token's, as in the torch engine."""
    filling = Filling(pooling="hf", pad_token_id=0, reads_first=True)

    assert filling.feed([((5, 6, 7), 0)])["pooled_position"].tolist() == [0]


def test_rectangles_on_a_gpu_have_lengths_by_the_step() -> None:
    """Filling up to a multiple changes neither mask nor weights of the real tokens."""
    feed = Filling(pooling="hf", pad_token_id=0, reads_first=False, length_step=8).feed([((5, 6, 7), 1)])

    assert feed["input_ids"].tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert feed["mean_weights"].tolist() == [[0, 0.5, 0.5, 0, 0, 0, 0, 0]]
    assert feed["position_ids"].tolist() == [list(range(8))]


def test_states_are_read_at_the_taps(folder: Path) -> None:
    """``mean`` counts the completion's tokens, or all where the border is unknown; ``last`` is the pooled token."""
    rows = embedding()
    sequences = [TokenSequence((9, 4, 30, 31), 2), TokenSequence((9, 4, 30, 31)), TokenSequence((50, 51), 2)]

    states = load(folder).forward(sequences, states=True).states

    assert states is not None
    assert states.shape == (3, 2, rows.shape[1])
    assert np.allclose(states[0, 0], rows[[30, 31]].mean(axis=0), atol=1e-6)
    assert np.allclose(states[1, 0], rows[[9, 4, 30, 31]].mean(axis=0), atol=1e-6)
    assert np.allclose(states[2, 0], rows[[50, 51]].mean(axis=0), atol=1e-6)
    assert np.array_equal(states[:, 1], rows[[31, 31, 51]])


def test_only_the_wanted_taps_are_handed_on(folder: Path) -> None:
    """A calibration may want fewer taps than the graph reads, in an order of its own."""
    engine = load(folder, taps=(StateTap(0, "last"),))

    states = engine.forward([TokenSequence((9, 4))], states=True).states

    assert engine.info.taps == (StateTap(0, "last"),)
    assert states is not None
    assert np.array_equal(states[0], embedding()[[4]])


def test_a_tap_that_the_graph_lacks_is_refused(folder: Path) -> None:
    """States cannot be had from where the export did not read them, and the message says what to export."""
    with pytest.raises(SettingsError, match="--taps 3:mean"):
        load(folder, taps=(StateTap(3, "mean"),))


def test_asking_for_states_changes_no_bit_of_a_reward(folder: Path) -> None:
    """The pass that gives the rewards is the same with and without states, also where borders differ."""
    engine = load(folder)
    sequences = [TokenSequence((9, 4, 30), 1), TokenSequence((9, 4, 30), 2), TokenSequence((77, 3))]

    assert engine.forward(sequences).rewards == engine.forward(sequences, states=True).rewards


def test_equal_texts_are_computed_once(folder: Path) -> None:
    """The same ids in a batch are one row, so their rewards are equal bit for bit."""
    engine = load(folder)
    session = recorded(engine)

    rewards = rewards_of(engine, [ROWS[0], ROWS[1], ROWS[0]])

    assert session.shapes == [(2, 3)]
    assert rewards[0] == rewards[2]


def test_deterministic_gives_each_text_a_pass_of_its_own(folder: Path) -> None:
    """No neighbour and no filling: every rectangle has one row of its own length."""
    engine = load(folder, deterministic=True)
    session = recorded(engine)

    rewards_of(engine, ROWS)

    assert session.shapes == [(1, 3), (1, 1), (1, 8), (1, 2)]


def test_the_first_pass_is_the_same_with_states() -> None:
    """Ids with several borders take part once; the other borders follow for their states alone."""
    wanted = [((1, 2), 0), ((1, 2), 1), ((3,), 0)]

    assert list(passes_over(wanted, apart=False, states=False)) == [[((1, 2), 0), ((3,), 0)]]
    assert list(passes_over(wanted, apart=False, states=True)) == [[((1, 2), 0), ((3,), 0)], [((1, 2), 1)]]


@pytest.mark.parametrize(
    "failure", [MemoryError(), RuntimeError("Failed to allocate memory for requested buffer of size 9")]
)
def test_a_lack_of_memory_has_a_class_of_its_own(folder: Path, failure: Exception) -> None:
    """ONNX Runtime's ways of saying that there is no room become ours, and the engine goes on."""
    engine = load(folder)
    session = recorded(engine, failure)

    with pytest.raises(EngineOutOfMemory, match="1 x 3 tokens"):
        rewards_of(engine, ROWS[:1])

    session._failure = None
    assert rewards_of(engine, ROWS[:1]) == pytest.approx([reward_by_hand(ROWS[0])], abs=1e-5)


def test_other_failures_pass_unchanged(folder: Path) -> None:
    """What is no lack of memory is not called one."""
    engine = load(folder)
    recorded(engine, RuntimeError("the kernel does not like this"))

    with pytest.raises(RuntimeError, match="does not like"):
        rewards_of(engine, ROWS)


def test_recorded_rewards_that_do_not_come_again_refuse_to_serve(folder: Path) -> None:
    """A machine whose ONNX Runtime computes something else must not answer."""
    probe = read_manifest(folder).probes[0]
    change_manifest(folder, probes=(type(probe)(probe.token_ids, probe.reward + 0.01),))

    with pytest.raises(ParityError, match="recorded at export"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dtype": "bfloat16"}, "exported as fp32"), ({"forward": "packed"}, "packed")],
    ids=["another-dtype", "another-path"],
)
def test_settings_that_the_export_settled_otherwise_are_refused(
    folder: Path, settings: dict[str, str], said: str
) -> None:
    """Nothing that is asked for is silently not done."""
    with pytest.raises(SettingsError, match=said):
        load(folder, **settings)


def test_a_head_that_pools_by_itself_takes_no_other_pooling(folder: Path) -> None:
    """The rule of an encoder's own head cannot be changed from outside."""
    change_manifest(folder, has_linear_head=False)

    with pytest.raises(SettingsError, match="pools in its own head"):
        load(folder, pooling="last")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(folder: Path) -> None:
    """ONNX Runtime itself goes on with the CPU and a line in its log; we do not."""
    with pytest.raises(SettingsError, match="CUDA"):
        open_session(folder / "model.onnx", "cuda:0", 1)


def test_a_provider_that_did_not_start_is_told() -> None:
    """What the session says is active decides, not what was asked for."""
    refuse_missing_provider("cpu", ["CPUExecutionProvider"])
    with pytest.raises(SettingsError, match="could not start its CUDAExecutionProvider"):
        refuse_missing_provider("cuda:1", ["CPUExecutionProvider"])


def test_the_device_number_reaches_the_provider() -> None:
    """``cuda:1`` is the second device; small shape operations may stay on the CPU."""
    (name, options), (fallback, _) = wanted_providers("cuda:1")

    assert (name, options["device_id"], fallback) == ("CUDAExecutionProvider", 1, "CPUExecutionProvider")


def test_session_options_follow_the_settings() -> None:
    """Threads are those of the setting, and nothing runs beside or spins."""
    options = session_options(3)

    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert not options.enable_mem_pattern


@pytest.mark.parametrize(("exact", "precision_mode"), [(True, ""), (False, "1")], ids=["vnni", "no-vnni"])
def test_int8_products_never_saturate(exact: bool, precision_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VNNI ONNX Runtime multiplies uint8 by uint8, which does not saturate; with it, the faster way."""
    monkeypatch.setattr("service.engines.devices.device.multiplies_int8_exactly", lambda: exact)

    options = session_options(None)

    key = "session.x64quantprecision"
    assert (options.get_session_config_entry(key) if not exact else "") == precision_mode
    if exact:
        with pytest.raises(RuntimeError):  # ONNX Runtime raises where an entry was not added
            options.get_session_config_entry(key)


def test_a_closed_engine_says_so(folder: Path) -> None:
    """After ``close`` there is nothing to compute with."""
    engine = load(folder)
    engine.close()

    with pytest.raises(RuntimeError, match="closed"):
        rewards_of(engine, ROWS)


@pytest.mark.gpu
def test_rewards_on_a_gpu_are_those_of_the_cpu(folder: Path) -> None:
    """Bound inputs and outputs carry the same numbers, and the CUDA provider is the one that runs."""
    engine = load(folder, device="cuda")

    assert engine.info.providers[0] == "CUDAExecutionProvider"
    assert rewards_of(engine, ROWS) == pytest.approx([reward_by_hand(row) for row in ROWS], abs=1e-4)
