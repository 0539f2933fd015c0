"""The packed path gives the rewards of plain transformers, whatever the composition of the batch."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr
from tiny_classifiers import load_tiny, packed_path, random_rows, rows_that_share, rows_with_endings, shuffled_batches
from tiny_models import DECODER_FAMILIES, ENCODER_FAMILIES
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from service.engines.attention import interface as attention
from service.engines.attention import per_sequence, varlen
from service.engines.attention.call import PackingUnsupportedError
from service.engines.attention.interface import no_mask, register_packed_attention
from service.engines.parity import plain_rewards
from service.engines.paths import packed


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["own-pad", "pad-is-eos"])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_packed_rewards_are_plain_transformers_rewards(tiny_checkpoint, family: str, pad_is_eos: bool) -> None:
    """In fp32 every family's packed rewards equal its plain forward one by one, for all lengths and endings."""
    classifier = load_tiny(tiny_checkpoint(family, pad_is_eos=pad_is_eos))
    rows = rows_with_endings(classifier)
    plain = plain_rewards(classifier, rows)

    rewards = packed_path(classifier).run(rows).rewards

    assert rewards == pytest.approx(plain, abs=1e-5, rel=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_half_precision_preserves_the_ranking(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """In half precision the packed rewards rank 200 items as the plain forward in fp32 does: Spearman 0.999."""
    folder = tiny_checkpoint(family)
    exact = load_tiny(folder)
    rows = random_rows(exact, lengths=tuple(range(3, 43)) * 5)
    plain = plain_rewards(exact, rows)

    rewards = packed_path(load_tiny(folder, dtype)).run(rows).rewards

    assert spearmanr(rewards, plain).statistic >= 0.999


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_batch_and_order_do_not_change_a_reward_in_fp32(tiny_checkpoint, family: str) -> None:
    """A text's fp32 reward is the same within 1e-5 alone, in any batch and in any order."""
    classifier = load_tiny(tiny_checkpoint(family))
    path = packed_path(classifier)
    rows = random_rows(classifier)
    alone = {row: path.run([row]).rewards[0] for row in rows}

    for seed in range(4):
        for batch in shuffled_batches(rows, seed):
            assert path.run(batch).rewards == pytest.approx([alone[row] for row in batch], abs=1e-5, rel=0)


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_batch_and_order_do_not_change_a_bit_in_bf16(tiny_checkpoint, family: str) -> None:
    """A text's bf16 reward on a CPU is bit-identical alone, in any batch and in any order."""
    classifier = load_tiny(tiny_checkpoint(family, hidden_size=192, intermediate_size=576), torch.bfloat16)
    path = packed_path(classifier)
    rows = random_rows(classifier, lengths=(5, 1, 70, 133, 200, 2, 64))
    alone = {row: path.run([row]).rewards[0] for row in rows}

    for seed in range(3):
        for batch in shuffled_batches(rows, seed):
            assert path.run(batch).rewards == [alone[row] for row in batch]


def test_another_sequence_of_the_batch_changes_nothing(tiny_checkpoint) -> None:
    """Replacing one sequence of a batch by another of the same length changes no bit of the other rewards."""
    classifier = load_tiny(tiny_checkpoint("llama"))
    path = packed_path(classifier)
    before, middle, other, after = random_rows(classifier, lengths=(20, 30, 30, 40))

    first = path.run([before, middle, after]).rewards
    second = path.run([before, other, after]).rewards

    assert (first[0], first[2]) == (second[0], second[2])
    assert first[1] != second[1]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "phi3"])
def test_the_sliding_window_is_applied(tiny_checkpoint, family: str) -> None:
    """A sequence longer than the window gets the window's reward, which differs from the reward without one."""
    windowed = load_tiny(tiny_checkpoint(family, sliding_window=16))
    unbounded = load_tiny(tiny_checkpoint(family, sliding_window=400))
    rows = random_rows(windowed, lengths=(100, 15, 16, 17, 18))

    rewards = packed_path(windowed).run(rows).rewards
    without_window = packed_path(unbounded).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(windowed, rows), abs=1e-5, rel=0)
    assert abs(rewards[0] - without_window[0]) > 0.01
    assert rewards[1:3] == pytest.approx(without_window[1:3], abs=1e-5, rel=0)


def test_layers_have_windows_of_their_own(tiny_checkpoint) -> None:
    """Qwen2 with windows in its upper layers only is supported: each layer applies its own window."""
    classifier = load_tiny(tiny_checkpoint("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2))
    without = load_tiny(tiny_checkpoint("qwen2"))
    rows = random_rows(classifier, lengths=(60, 8, 9))

    rewards = packed_path(classifier).run(rows).rewards

    assert classifier.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)
    assert abs(rewards[0] - packed_path(without).run(rows).rewards[0]) > 0.01


def test_the_soft_cap_is_applied(tiny_checkpoint) -> None:
    """Gemma-2's soft cap changes the reward: a tight cap gives another one than a loose cap, equal to the plain one."""
    tight = load_tiny(tiny_checkpoint("gemma2", attn_logit_softcapping=0.3))
    loose = load_tiny(tiny_checkpoint("gemma2", attn_logit_softcapping=50.0))
    rows = random_rows(tight)

    rewards = packed_path(tight).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(tight, rows), abs=1e-5, rel=0)
    assert abs(rewards[2] - packed_path(loose).run(rows).rewards[2]) > 0.01


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_long_sequences_are_computed_in_query_blocks(tiny_checkpoint, monkeypatch, family: str) -> None:
    """Cutting the queries of a long sequence into blocks, so that no mask grows with its square, changes no reward."""
    monkeypatch.setattr(per_sequence, "QUERY_BLOCK", 32)
    classifier = load_tiny(tiny_checkpoint(family))
    rows = random_rows(classifier, lengths=(130, 32, 33, 48, 7))

    rewards = packed_path(classifier).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_last_pooling_reads_the_last_token(tiny_checkpoint, family: str) -> None:
    """With ``last`` pooling a final EOS that is the pad token is scored; with ``hf`` it is skipped."""
    folder = tiny_checkpoint(family, pad_is_eos=True)
    last, rule = load_tiny(folder, pooling="last"), load_tiny(folder, pooling="hf")
    (row,) = random_rows(last, lengths=(30,))
    ended = (*row, last.config.eos_token_id)

    last_rewards = packed_path(last).run([row, ended]).rewards
    rule_rewards = packed_path(rule).run([row, ended]).rewards

    assert last_rewards == pytest.approx(plain_rewards(last, [row, ended]), abs=1e-5, rel=0)
    assert last_rewards[0] == rule_rewards[0] == rule_rewards[1]
    assert abs(last_rewards[1] - rule_rewards[1]) > 1e-3


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_encoders_are_refused(tiny_checkpoint, family: str) -> None:
    """A model whose head is more than one linear layer is refused at construction, not scored wrongly."""
    with pytest.raises(PackingUnsupportedError):
        packed_path(load_tiny(tiny_checkpoint(family)))


def test_bidirectional_attention_is_refused(tiny_checkpoint) -> None:
    """A decoder with bidirectional attention is refused at its first pass."""
    classifier = load_tiny(tiny_checkpoint("gemma3", use_bidirectional_attention=True))

    with pytest.raises(PackingUnsupportedError):
        packed_path(classifier).run(random_rows(classifier))


def test_registration_happens_once_and_on_request() -> None:
    """A second call leaves what is registered as it is, so that a later registration under the name is not undone."""
    name = register_packed_attention()
    registered = AttentionInterface()[name]
    AttentionInterface.register(name, no_mask)
    try:
        assert register_packed_attention() == name
        assert AttentionInterface()[name] is no_mask
    finally:
        AttentionInterface.register(name, registered)


def test_importing_attention_registers_nothing() -> None:
    """Importing the module changes no state of transformers; only the explicit call registers attention and mask."""
    code = (
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "from service.engines.attention.interface import ATTENTION, register_packed_attention\n"
        "registries = AttentionInterface(), AttentionMaskInterface()\n"
        "assert not any(ATTENTION in registry for registry in registries)\n"
        "register_packed_attention()\n"
        "assert all(ATTENTION in registry for registry in registries)\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_mask_is_built() -> None:
    """The mask function builds nothing for a causal batch, and refuses a pattern that it would have to build."""
    no_mask(batch_size=1, q_length=10**6, kv_length=10**6, use_vmap=False)
    with pytest.raises(PackingUnsupportedError):
        no_mask(use_vmap=True)


def documented_varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """Compute what torch's CUDA kernel documents: a query attends to `left` keys before its own position.

    The log-sum-exp is the one of a softmax over scaled scores, float32 [heads, queries].
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert (len(query), len(key), len(value)) == (cu_seq_q[-1], cu_seq_k[-1], cu_seq_k[-1])
    left, right = window_size
    assert (left, right) == (-1, -1) or right == 0
    assert return_aux.lse
    output, weights = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for (begin, end), (first, last) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        depth = (last - first) - (end - begin)  # the last query is aligned with the last key
        distance = depth + torch.arange(end - begin)[:, None] - torch.arange(last - first)
        seen = ((distance >= 0) | (right < 0)) & ((distance <= left) | (left < 0))
        queries, keys, values = (
            part.transpose(0, 1)[None] for part in (query[begin:end], key[first:last], value[first:last])
        )
        attended = scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        output[begin:end] = attended[0].transpose(0, 1)
        keys = keys.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = queries @ keys.transpose(2, 3) * (query.shape[2] ** -0.5 if scale is None else scale)
        weights[:, begin:end] = scores[0].masked_fill(~seen, float("-inf")).logsumexp(dim=-1)
    return output, weights


@pytest.mark.parametrize("cascade", [False, True], ids=["gathered", "cascade"])
@pytest.mark.parametrize("has_grouped_queries", [True, False], ids=["grouped-queries", "torch-2.11"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "olmo2"])
def test_the_varlen_kernel_is_called_as_documented(
    tiny_checkpoint, monkeypatch, family: str, has_grouped_queries: bool, cascade: bool
) -> None:
    """Layout, limits, scale, window and key heads reach the kernel as documented: a stand-in gives plain rewards."""
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda query, value: True)
    monkeypatch.setattr(varlen, "_has_kernel", lambda device: True)
    monkeypatch.setattr(varlen, "varlen_attn", documented_varlen_attn)
    monkeypatch.setattr(varlen, "HAS_GROUPED_QUERIES", has_grouped_queries)
    monkeypatch.setattr(packed, "BLOCK", 1)  # as on CUDA
    classifier = load_tiny(tiny_checkpoint(family))
    rows = [*random_rows(classifier), *rows_that_share(classifier)]

    rewards = packed_path(classifier, cascade=cascade).run(rows).rewards

    assert rewards == pytest.approx(plain_rewards(classifier, rows), abs=1e-5, rel=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_packed_rewards_are_plain_rewards_on_cuda(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """On CUDA, with the variable-length kernel where it applies, packed rewards equal the plain forward one by one."""
    classifier = load_tiny(tiny_checkpoint(family), dtype, device=torch.device("cuda"))
    rows = rows_with_endings(classifier)
    plain = plain_rewards(classifier, rows)

    rewards = packed_path(classifier).run(rows).rewards

    assert rewards == pytest.approx(plain, abs=1e-4 if dtype == torch.float32 else 0.1, rel=0)
