"""Shared prefixes are computed once, and rewards do not change."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from tiny_classifiers import (
    load_tiny,
    packed_path,
    random_rows,
    rows_that_share,
    rows_with_endings,
    shuffled_batches,
    with_pad,
)
from tiny_models import DECODER_FAMILIES

from service.engines.attention.layout import PackedLayout
from service.engines.parity import plain_rewards
from service.engines.paths.cuda_graphs import Bucket, PassLibrary
from service.engines.paths.packed import MIN_SHARED_TOKENS

CPU = torch.device("cpu")
AVX2_ALONE = torch.backends.cpu.get_cpu_capability() in {"AVX2", "DEFAULT"}


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_shared_rewards_are_plain_transformers_rewards(tiny_checkpoint, family: str) -> None:
    """In fp32 rewards of nested prefixes equal the plain forward one by one, also with windows far shorter than them.

    The batch has system prompt > prompts > completions, sequences that are prefixes of others, and endings that move
    the pooled token into the shared prefix.
    """
    classifier = load_tiny(tiny_checkpoint(family, pad_is_eos=True))
    rows = rows_that_share(classifier)
    rows = list(dict.fromkeys([*rows, *with_pad(classifier, rows), *rows_with_endings(classifier)]))

    output = packed_path(classifier).run(rows)

    assert output.rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)
    assert sum(output.shared_tokens) > sum(map(len, rows)) / 2


@pytest.mark.skipif(AVX2_ALONE, reason="torch sums products in bfloat16 in an order that depends on their shape")
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_sharing_does_not_change_a_bit_in_bf16(tiny_checkpoint, family: str) -> None:
    """A text's bf16 reward on a CPU is bit-identical alone, without sharing, and with it in any batch and order."""
    classifier = load_tiny(tiny_checkpoint(family, hidden_size=192, intermediate_size=576), torch.bfloat16)
    rows = rows_that_share(classifier)
    unshared = packed_path(classifier, share_prefixes=False)
    alone = {row: unshared.run([row]).rewards[0] for row in rows}
    path = packed_path(classifier)

    assert unshared.run(rows).rewards == [alone[row] for row in rows]
    for seed in range(2):
        for batch in [rows, *shuffled_batches(rows, seed)]:
            assert path.run(batch).rewards == [alone[row] for row in batch]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_long_prefixes_do_not_change_a_bit_in_bf16(tiny_checkpoint, family: str) -> None:
    """The same holds where queries are computed in several blocks and hundreds of keys are out of the window."""
    if AVX2_ALONE or (family == "gemma2" and not torch.cpu._is_amx_tile_supported()):
        pytest.skip("torch sums products in bfloat16 in an order that depends on their shape")
    folder = tiny_checkpoint(family, max_position_embeddings=2048, sliding_window=300)
    classifier = load_tiny(folder, torch.bfloat16)
    long, other = random_rows(classifier, lengths=(1150, 700))
    rows = [long[:1100], long, long[:610] + other, long[:33] + other[:5], long[:900] + other[:3]]
    unshared = packed_path(classifier, share_prefixes=False)

    output = packed_path(classifier).run(rows)

    assert output.rewards == [unshared.run([row]).rewards[0] for row in rows]
    assert max(output.shared_tokens) == 1100


def test_shared_tokens_are_counted(tiny_checkpoint) -> None:
    """The leading tokens of each sequence that are computed for another one are counted."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    prompt, first, second, unrelated = random_rows(classifier, lengths=(40, 9, 12, 30))
    rows = [prompt + first, prompt + second, unrelated]

    output = packed_path(classifier).run(rows)

    assert sorted(output.shared_tokens[:2]) == [0, 40]
    assert output.shared_tokens[2] == 0
    assert packed_path(classifier, share_prefixes=False).run(rows).shared_tokens == [0, 0, 0]


def test_a_short_prefix_is_not_shared(tiny_checkpoint) -> None:
    """A prefix that costs more in attention than it saves is computed for each sequence."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    (stem,) = random_rows(classifier, lengths=(MIN_SHARED_TOKENS,))
    rows = [(*stem[:-1], 9, 9), (*stem[:-1], 8, 8), (*stem, 7), (*stem, 6)]

    assert sorted(packed_path(classifier).run(rows).shared_tokens) == [0, 0, 0, MIN_SHARED_TOKENS]


def test_a_sequence_with_nan_states_changes_no_other_reward(tiny_checkpoint) -> None:
    """A text whose states are not finite changes no other reward, not even of texts that share its prefix."""
    classifier = load_tiny(tiny_checkpoint("llama"), torch.bfloat16)
    prompt, good, other = random_rows(classifier, lengths=(40, 10, 50))
    nan_token = 5
    with torch.no_grad():
        classifier.model.get_input_embeddings().weight[nan_token] = torch.nan
    clean = [tuple(6 if token == nan_token else token for token in row) for row in (prompt + good, other)]
    bad = (*clean[0][:40], nan_token, 9)
    path = packed_path(classifier)

    rewards = path.run([clean[0], bad, clean[1]]).rewards

    assert rewards[1] != rewards[1]
    assert [rewards[0], rewards[2]] == [path.run([row]).rewards[0] for row in clean]


@pytest.mark.parametrize("block", [1, 32])
def test_attention_gathers_no_more_than_the_batch(block: int) -> None:
    """However much is shared, a chunk gathers at most as many keys as the batch has tokens, or those of one sequence.

    Every token is a query once.
    """
    dice = random.Random(0)
    stem = tuple(range(400))
    rows = [stem + tuple(dice.randrange(9) for _ in range(dice.randrange(1, 40))) for _ in range(64)]
    rows = list(dict.fromkeys(rows))

    layout = PackedLayout.of(rows, CPU, block=block, min_shared_tokens=16)

    num_tokens = layout.num_tokens
    assert num_tokens < sum(map(len, rows)) / 5
    own_tokens: list[int] = []
    for chunk in layout.chunks:
        assert len(chunk.keys) <= num_tokens + 64 * (block - 1) or len(chunk.sequences) == 1
        assert chunk.queries.max() < num_tokens
        assert chunk.keys.max() < num_tokens
        assert chunk.cu_seqlens_q[-1] == len(chunk.queries)
        assert chunk.cu_seqlens_k[-1] == len(chunk.keys)
        for span in chunk.sequences:
            begin, end = span.own
            own_tokens += range(begin, end)
            queries = chunk.queries[slice(*span.queries)]
            assert queries[: end - begin].tolist() == list(range(begin, end))
            assert (span.queries[1] - span.queries[0]) % block == (span.keys[1] - span.keys[0]) % block == 0
    assert own_tokens == list(range(num_tokens))


def test_every_sequence_can_be_read_from_the_packed_batch() -> None:
    """Tokens and positions of the packed batch, read through a sequence's layout, are those of the sequence."""
    rows = [(1, 2, 3, 4, 5), (1, 2, 3, 9), (7,), (1, 2, 3, 4, 5, 6)]

    layout = PackedLayout.of(rows, CPU, min_shared_tokens=2)

    ids, positions = layout.token_ids(rows, 0), layout.position_ids()[0].tolist()
    assert len(ids) == len(positions) == layout.num_tokens == 8
    for row, sequence in zip(rows, layout.sequences, strict=True):
        indices = [sequence.index_of(position) for position in range(len(row))]
        assert tuple(ids[index] for index in indices) == row
        assert [positions[index] for index in indices] == list(range(len(row)))


class RecordedStub:
    """A recorded pass that returns zeros."""

    def load(self, inputs: Iterable[torch.Tensor]) -> None:
        self.inputs = list(inputs)

    def compute(self) -> torch.Tensor:
        return torch.zeros(8, 1)


class OneBucket(PassLibrary):
    """Chooses the same recorded pass for every batch."""

    def choose(self, rows: Sequence[tuple[int, ...]]) -> tuple[Bucket, Any]:
        return Bucket(64, 8), RecordedStub()


def test_a_recorded_pass_is_chosen_without_a_layout(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CUDA graph fits, no layout and no prefix tree are built; a batch that shares a prefix gets a layout."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    prompt, first, second, unrelated = random_rows(classifier, lengths=(12, 9, 10, 11))
    path = packed_path(classifier)
    path.library = OneBucket({})
    shared = path.run([prompt + first, prompt + second])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a layout was built")

    monkeypatch.setattr(PackedLayout, "of", fail)
    monkeypatch.setattr("service.scheduling.prefix_tree.common_prefix_length", fail)

    assert sorted(shared.shared_tokens) == [0, 12]
    assert path.run([prompt + first, unrelated]).rewards == [0.0, 0.0]
    with pytest.raises(AssertionError, match="a layout was built"):
        path.run([prompt + first, prompt + second])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_shared_rewards_are_plain_rewards_on_cuda(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """On CUDA, where own queries attend to the gathered keys of their sequence, rewards equal the plain forward."""
    classifier = load_tiny(tiny_checkpoint(family), dtype, device=torch.device("cuda"))
    rows = rows_that_share(classifier)
    plain = plain_rewards(classifier, rows)

    rewards = packed_path(classifier).run(rows).rewards

    assert rewards == pytest.approx(plain, abs=1e-4 if dtype == torch.float32 else 0.1, rel=0)
