"""Batches of fixed shapes have the rewards of ordinary ones; which bucket a batch uses is decided without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_classifiers import load_tiny, packed_path, random_rows, rows_that_share, rows_with_endings
from tiny_models import DECODER_FAMILIES

from service.engines.attention import interface as attention
from service.engines.attention.call import PackingUnsupportedError
from service.engines.base import StateTap
from service.engines.model.taps import StateQuery
from service.engines.paths.cuda_graphs import (
    BATCH_LENGTHS,
    BUCKETS,
    MAX_PARAMETERS,
    Bucket,
    PassLibrary,
    StaticPass,
    bucket_for,
    capture_graphs,
    fill_bucket,
    probe_of,
    record_library,
    resolve_graphs,
)
from service.engines.torch import load_torch_engine
from service.errors import SettingsError
from service.settings import BatchingSettings, ModelSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = (Bucket(128, 8), Bucket(256, 8), Bucket(512, 16))
VARLEN_FAMILIES = [family for family in DECODER_FAMILIES if family != "gemma2"]
"""Those whose attention scores have no soft cap, which the kernel does not support."""


class RecordingLibrary(PassLibrary):
    """Records which buckets were used."""

    def __init__(self, passes):
        super().__init__(passes)
        self.used = []

    def choose(self, rows):
        chosen = super().choose(rows)
        self.used.append(chosen and chosen[0])
        return chosen


def attend_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU compute attention as the variable-length kernel defines it, from now on."""
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda *_: True)


def static_library(classifier) -> RecordingLibrary:
    return RecordingLibrary({bucket: StaticPass(classifier, bucket) for bucket in SMALL})


@given(st.integers(1, 5000), st.integers(1, 80))
def test_a_bucket_holds_what_it_is_chosen_for(num_tokens: int, num_sequences: int) -> None:
    """The chosen bucket has room, no shorter one has, and at most half of it is padding unless it is the shortest."""
    bucket = bucket_for(num_tokens, num_sequences)

    fitting = [one for one in BUCKETS if one.num_tokens >= num_tokens and one.num_sequences >= num_sequences]
    if bucket is None:
        assert not fitting or fitting[0].num_tokens > 2 * num_tokens
    else:
        assert bucket == fitting[0]
        assert bucket.num_tokens <= max(2 * num_tokens, BATCH_LENGTHS[0])


def test_a_batch_is_padded_to_its_bucket() -> None:
    """Sequences follow each other, unused ones are empty, and the padding is a sequence of its own after them."""
    inputs = fill_bucket(Bucket(10, 4), [(5, 6, 7), (8, 9)], [2, 0], pad_id=1)

    assert inputs.ids.tolist() == [[5, 6, 7, 8, 9, 1, 1, 1, 1, 1]]
    assert inputs.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]
    assert inputs.cu_seqlens.tolist() == [0, 3, 5, 5, 5, 10]
    assert inputs.cu_seqlens.dtype == torch.int32
    assert inputs.pooled.tolist() == [2, 3, 0, 0]


def test_a_full_bucket_needs_no_padding() -> None:
    """With every token and every sequence used, the padding sequence is empty."""
    inputs = fill_bucket(Bucket(5, 2), [(5, 6, 7), (8, 9)], [2, 1], pad_id=1)

    assert inputs.cu_seqlens.tolist() == [0, 3, 5, 5]
    assert inputs.pooled.tolist() == [2, 4]


@pytest.mark.parametrize("family", VARLEN_FAMILIES)
def test_static_rewards_are_the_packed_ones(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Batch after batch through the same buffers, each text has its ordinary reward."""
    classifier = load_tiny(tiny_checkpoint(family))
    path = packed_path(classifier)
    texts = random_rows(classifier, lengths=(70, 33, 129, 2, 64, 17, 5, 90))
    batches = [texts[:2], texts[2:4], texts[:7], texts[4:6], [texts[3]], texts]
    expected = [path.run(rows).rewards for rows in batches]
    path.library = library = static_library(classifier)
    attend_as_a_gpu(monkeypatch)

    for rows, rewards in zip(batches, expected, strict=True):
        assert path.run(rows).rewards == pytest.approx(rewards, abs=1e-5, rel=0)

    assert {bucket and bucket.num_tokens for bucket in library.used} == {128, 256, 512}


def test_the_head_reads_the_same_token(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that end in EOS or pads are pooled at the position of the ordinary path."""
    classifier = load_tiny(tiny_checkpoint("llama", pad_is_eos=True))
    path = packed_path(classifier, share_prefixes=False)
    batches = [[row] for row in rows_with_endings(classifier)]
    expected = [path.run(rows).rewards for rows in batches]
    path.library = library = static_library(classifier)
    attend_as_a_gpu(monkeypatch)

    assert [path.run(rows).rewards for rows in batches] == [pytest.approx(one, abs=1e-5) for one in expected]
    assert all(library.used)


def test_what_a_bucket_does_not_support_runs_the_ordinary_way(tiny_checkpoint) -> None:
    """Shared prefixes, states and batches without a bucket give the same output as without a library."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    path = packed_path(classifier)
    shared = rows_that_share(classifier)[:6]
    long = random_rows(classifier, lengths=(300, 250))
    query = StateQuery((StateTap(1, "last"),), ((0, 0),))
    expected = [path.run(shared), path.run(long), path.run(long[:1], query)]
    path.library = static_library(classifier)

    found = [path.run(shared), path.run(long), path.run(long[:1], query)]

    for one, other in zip(found, expected, strict=True):
        assert one.rewards == other.rewards
        assert one.shared_tokens == other.shared_tokens
    assert found[2].states is not None
    assert expected[2].states is not None
    assert np.array_equal(found[2].states, expected[2].states)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_the_kernel_nothing_is_recorded(tiny_checkpoint, family: str) -> None:
    """Where attention runs one sequence at a time, a batch of unknown cu_seqlens is refused, not computed wrongly."""
    classifier = load_tiny(tiny_checkpoint(family))
    packed_path(classifier)

    with pytest.raises(PackingUnsupportedError, match="variable-length kernel"):
        StaticPass(classifier, SMALL[0]).compute()


@pytest.mark.parametrize("bucket", BUCKETS, ids=lambda bucket: str(bucket.num_tokens))
def test_a_probe_runs_in_its_own_bucket(bucket: Bucket) -> None:
    """The sequences that a recorded pass is tested with fit that pass, and share nothing."""
    rows = probe_of(bucket, vocab_size=1000)

    assert bucket_for(sum(map(len, rows)), len(rows)) == bucket
    assert len({row[:8] for row in rows}) == len(rows)


def test_the_setting_is_resolved_against_the_device() -> None:
    """``auto`` records graphs of small models on CUDA; required on a CPU they are refused with an error."""
    assert resolve_graphs("auto", CUDA, MAX_PARAMETERS)
    assert not resolve_graphs("auto", CUDA, MAX_PARAMETERS + 1)
    assert resolve_graphs(True, CUDA, MAX_PARAMETERS + 1)
    assert not resolve_graphs(False, CUDA, 1)
    assert not resolve_graphs("auto", CPU, 1)
    with pytest.raises(SettingsError, match="cuda_graphs needs a CUDA device"):
        resolve_graphs(True, CPU, 1)


def test_deterministic_rewards_exclude_graphs() -> None:
    """A recorded pass reads no states, so a reward could depend on whether states are read: both is refused."""
    assert not resolve_graphs("auto", CUDA, 1, deterministic=True)
    with pytest.raises(SettingsError, match="contradict"):
        resolve_graphs(True, CUDA, 1, deterministic=True)


def record_on_cpu(classifier, max_batch_tokens: int) -> PassLibrary:
    return PassLibrary({bucket: StaticPass(classifier, bucket) for bucket in SMALL})


def test_each_recorded_pass_is_compared_with_an_ordinary_one(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that agree are used; if one does not, the log has an error and none is used."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    path = packed_path(classifier, share_prefixes=False)
    probes = {bucket: probe_of(bucket, classifier.config.vocab_size) for bucket in SMALL}
    ordinary = {tuple(rows): path.run(rows).at_pooled for rows in probes.values()}
    attend_as_a_gpu(monkeypatch)

    library, failure = record_library(classifier, lambda rows: ordinary[tuple(rows)], 4096, 1e-5, record_on_cpu)
    assert (library.max_tokens, failure) == (512, "")

    ordinary[tuple(probes[SMALL[1]])][2][0] += 0.1
    library, failure = record_library(classifier, lambda rows: ordinary[tuple(rows)], 4096, 1e-5, record_on_cpu)
    assert library.max_tokens == 0
    assert "batch of 256 tokens differs by 0.1" in failure


def test_a_failure_to_record_is_logged(tiny_checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    """A capture that raises leaves the model able to serve, and the reason is logged and returned."""
    classifier = load_tiny(tiny_checkpoint("gemma2"))
    path = packed_path(classifier)

    library, failure = record_library(classifier, lambda rows: path.run(rows).at_pooled, 4096, 1e-5, record_on_cpu)

    assert library.max_tokens == 0
    assert "variable-length kernel" in failure
    assert failure in caplog.text
    assert len(path.run([(5, 6, 7)]).rewards) == 1


def test_an_engine_on_a_cpu_refuses_graphs(tiny_checkpoint) -> None:
    """Required on a CPU they fail the start with an error; ``auto`` does not use them."""
    folder, batching = tiny_checkpoint("llama"), BatchingSettings()
    settings = {"device": "cpu", "dtype": "float32", "num_threads": 1}

    with pytest.raises(SettingsError, match="cuda_graphs"):
        load_torch_engine(
            folder, ModelSettings(**settings, cuda_graphs=True), batching, pad_token_id=0, max_input_tokens=99
        )
    engine = load_torch_engine(folder, ModelSettings(**settings), batching, pad_token_id=0, max_input_tokens=99)
    assert (engine.info.cuda_graph_max_tokens, engine.info.cuda_graph_failure, engine.info.async_launch) == (
        0,
        "",
        False,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("family", VARLEN_FAMILIES)
def test_recorded_rewards_equal_the_packed_ones(tiny_checkpoint, family: str) -> None:
    """On CUDA every recorded pass gives the rewards of the ordinary one, also when several are in flight."""
    classifier = load_tiny(tiny_checkpoint(family), torch.bfloat16, device=CUDA)
    path = packed_path(classifier, share_prefixes=False)
    batches = [probe_of(bucket, classifier.config.vocab_size) for bucket in BUCKETS if bucket.num_tokens <= 512]
    expected = [path.run(rows).rewards for rows in batches]

    path.library = capture_graphs(classifier, max_batch_tokens=512)
    pending = [path.launch(rows) for rows in batches]

    for waiting, rewards in zip(pending, expected, strict=True):
        assert waiting.result().rewards == pytest.approx(rewards, abs=0.05, rel=0)
