"""The ONNX engine gives the graph the right inputs, is batch-invariant, and runs on the requested device alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bundles import TAPS, change_manifest, embedding, reward_by_hand, write_tiny_bundle

from service.checkpoints.bundle import open_bundle, read_manifest
from service.engines.deduplication import Reading
from service.engines.onnx import OnnxEngine, Padding, load_onnx_engine, passes_over
from service.engines.onnx_session import open_session, refuse_missing_provider, requested_providers, session_options
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
    """A session that records the shapes of its inputs, and raises a given error."""

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


def test_rewards_equal_a_hand_calculation(folder: Path) -> None:
    """Padding, mask and pooled position are right for sequences of different lengths, and the order is preserved."""
    rewards = rewards_of(load(folder), ROWS)

    assert rewards == pytest.approx([reward_by_hand(row) for row in ROWS], abs=1e-5)


def test_info_describes_where_and_how_the_graph_runs(folder: Path) -> None:
    """The info has the engine, batch cost, dtype, providers and the measurements of the export."""
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


def test_an_encoder_head_reads_the_first_token() -> None:
    """For encoders that pool by themselves the state of ``last`` is the first token's, as in the torch engine."""
    padding = Padding(pooling="hf", pad_token_id=0, reads_first=True)

    assert padding.feed([Reading((5, 6, 7), 0)])["pooled_position"].tolist() == [0]


def test_batches_on_a_gpu_are_padded_to_the_length_step() -> None:
    """Padding to a multiple changes neither the mask nor the weights of the real tokens."""
    feed = Padding(pooling="hf", pad_token_id=0, reads_first=False, length_step=8).feed([Reading((5, 6, 7), 1)])

    assert feed["input_ids"].tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert feed["mean_weights"].tolist() == [[0, 0.5, 0.5, 0, 0, 0, 0, 0]]
    assert feed["position_ids"].tolist() == [list(range(8))]


def test_states_are_read_at_the_taps(folder: Path) -> None:
    """``mean`` counts the completion's tokens, or all where the prompt is unknown; ``last`` is the pooled token."""
    rows = embedding()
    sequences = [TokenSequence((9, 4, 30, 31), 2), TokenSequence((9, 4, 30, 31)), TokenSequence((50, 51), 2)]

    states = load(folder).forward(sequences, states=True).states

    assert states is not None
    assert states.shape == (3, 2, rows.shape[1])
    assert np.allclose(states[0, 0], rows[[30, 31]].mean(axis=0), atol=1e-6)
    assert np.allclose(states[1, 0], rows[[9, 4, 30, 31]].mean(axis=0), atol=1e-6)
    assert np.allclose(states[2, 0], rows[[50, 51]].mean(axis=0), atol=1e-6)
    assert np.array_equal(states[:, 1], rows[[31, 31, 51]])


def test_only_the_requested_taps_are_returned(folder: Path) -> None:
    """A calibration may use fewer taps than the graph reads, in another order."""
    engine = load(folder, taps=(StateTap(0, "last"),))

    states = engine.forward([TokenSequence((9, 4))], states=True).states

    assert engine.info.taps == (StateTap(0, "last"),)
    assert states is not None
    assert np.array_equal(states[0], embedding()[[4]])


def test_a_tap_that_the_graph_lacks_is_refused(folder: Path) -> None:
    """States cannot be read where the export did not, and the message contains the export option."""
    with pytest.raises(SettingsError, match="--taps 3:mean"):
        load(folder, taps=(StateTap(3, "mean"),))


def test_requesting_states_changes_no_bit_of_a_reward(folder: Path) -> None:
    """The pass that gives the rewards is the same with and without states, also for ids with several prompts."""
    engine = load(folder)
    sequences = [TokenSequence((9, 4, 30), 1), TokenSequence((9, 4, 30), 2), TokenSequence((77, 3))]

    assert engine.forward(sequences).rewards == engine.forward(sequences, states=True).rewards


def test_equal_sequences_are_computed_once(folder: Path) -> None:
    """The same ids in a batch are computed once, so their rewards are equal bit for bit."""
    engine = load(folder)
    session = recorded(engine)

    rewards = rewards_of(engine, [ROWS[0], ROWS[1], ROWS[0]])

    assert session.shapes == [(2, 3)]
    assert rewards[0] == rewards[2]


def test_batch_invariance_is_refused_for_a_bundle(folder: Path) -> None:
    """The setting is for the torch engine; the error names the one that a bundle has."""
    settings = ModelSettings(device="cpu")

    with pytest.raises(SettingsError, match=r"with an ONNX bundle use batching\.deterministic"):
        load_onnx_engine(open_bundle(folder, settings), settings, BatchingSettings(batch_invariant=True))


def test_deterministic_runs_each_sequence_in_its_own_pass(folder: Path) -> None:
    """No other sequences and no padding: every pass has one sequence of its own length."""
    engine = load(folder, deterministic=True)
    session = recorded(engine)

    rewards_of(engine, ROWS)

    assert session.shapes == [(1, 3), (1, 1), (1, 8), (1, 2)]


def test_the_first_pass_is_the_same_with_states() -> None:
    """Equal ids with several prompts run once; the other prompts follow for their states alone."""
    readings = [Reading((1, 2), 0), Reading((1, 2), 1), Reading((3,), 0)]

    assert list(passes_over(readings, one_by_one=False, states=False)) == [[((1, 2), 0), ((3,), 0)]]
    assert list(passes_over(readings, one_by_one=False, states=True)) == [[((1, 2), 0), ((3,), 0)], [((1, 2), 1)]]


@pytest.mark.parametrize(
    "failure", [MemoryError(), RuntimeError("Failed to allocate memory for requested buffer of size 9")]
)
def test_out_of_memory_is_translated(folder: Path, failure: Exception) -> None:
    """ONNX Runtime's out-of-memory errors become EngineOutOfMemory, and the engine is usable again."""
    engine = load(folder)
    session = recorded(engine, failure)

    with pytest.raises(EngineOutOfMemory, match="1 x 3 tokens"):
        rewards_of(engine, ROWS[:1])

    session._failure = None
    assert rewards_of(engine, ROWS[:1]) == pytest.approx([reward_by_hand(ROWS[0])], abs=1e-5)


def test_other_failures_pass_unchanged(folder: Path) -> None:
    """An error that is not about memory is not translated."""
    engine = load(folder)
    recorded(engine, RuntimeError("the kernel does not like this"))

    with pytest.raises(RuntimeError, match="does not like"):
        rewards_of(engine, ROWS)


def test_rewards_that_differ_from_the_recorded_ones_are_refused(folder: Path) -> None:
    """A machine whose ONNX Runtime computes other rewards does not serve."""
    probe = read_manifest(folder).probes[0]
    change_manifest(folder, probes=(type(probe)(probe.token_ids, probe.reward + 0.01),))

    with pytest.raises(ParityError, match="recorded at export"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"dtype": "bfloat16"}, "exported as fp32"), ({"forward": "packed"}, "packed")],
    ids=["another-dtype", "another-path"],
)
def test_settings_that_contradict_the_export_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    """No setting is silently ignored."""
    with pytest.raises(SettingsError, match=message):
        load(folder, **settings)


def test_a_head_that_pools_itself_refuses_another_pooling(folder: Path) -> None:
    """The pooling of an encoder's own head cannot be changed by a setting."""
    change_manifest(folder, has_linear_head=False)

    with pytest.raises(SettingsError, match="pools in its own head"):
        load(folder, pooling="last")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_never_falls_back_to_the_cpu(folder: Path) -> None:
    """ONNX Runtime itself falls back to the CPU and logs it; the engine refuses."""
    with pytest.raises(SettingsError, match="CUDA"):
        open_session(folder / "model.onnx", "cuda:0", 1)


def test_a_provider_that_did_not_start_is_refused() -> None:
    """The session's active providers decide, not the requested ones."""
    refuse_missing_provider("cpu", ["CPUExecutionProvider"])
    with pytest.raises(SettingsError, match="could not start its CUDAExecutionProvider"):
        refuse_missing_provider("cuda:1", ["CPUExecutionProvider"])


def test_the_device_number_reaches_the_provider() -> None:
    """``cuda:1`` is the second device; small shape operations may stay on the CPU."""
    (name, options), (fallback, _) = requested_providers("cuda:1")

    assert (name, options["device_id"], fallback) == ("CUDAExecutionProvider", 1, "CPUExecutionProvider")


def test_session_options_follow_the_settings() -> None:
    """Threads are those of the setting, and nothing runs in parallel to the graph or spins."""
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


def test_a_closed_engine_raises(folder: Path) -> None:
    """After ``close`` a pass raises."""
    engine = load(folder)
    engine.close()

    with pytest.raises(RuntimeError, match="closed"):
        rewards_of(engine, ROWS)


@pytest.mark.gpu
def test_rewards_on_a_gpu_are_those_of_the_cpu(folder: Path) -> None:
    """Bound inputs and outputs give the same rewards, and the CUDA provider runs the graph."""
    engine = load(folder, device="cuda")

    assert engine.info.providers[0] == "CUDAExecutionProvider"
    assert rewards_of(engine, ROWS) == pytest.approx([reward_by_hand(row) for row in ROWS], abs=1e-4)
