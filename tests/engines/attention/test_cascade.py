"""Attention in two parts, merged by log-sum-exp, is attention; its reference is a softmax over all keys at once."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_classifiers import load_tiny, probe_and_choose, rows_that_share
from tiny_models import DECODER_FAMILIES
from torch.nn.functional import scaled_dot_product_attention

from service.engines.attention import interface as attention
from service.engines.attention.cascade import attend_cascade, merge, plan_cascade
from service.engines.attention.layout import Packing
from service.engines.attention.varlen import Borders, attend_varlen
from service.engines.parity import plain_rewards
from service.engines.paths import packed
from service.engines.paths.packed import PackedForward
from service.engines.torch import load_torch_engine
from service.errors import SettingsError
from service.settings import BatchingSettings, ModelSettings

CPU = torch.device("cpu")
VARLEN_FAMILIES = [family for family in DECODER_FAMILIES if family != "gemma2"]
"""Those without soft caps; the windows of some end within a beginning, which is then gathered."""


def random_states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_two_halves_merge_into_the_whole(scale: float) -> None:
    """Attention to the first and to the other keys, merged, is attention to all, also where one side has all weight."""
    query, key, value = (random_states(50, 4, 16, seed=seed) * scale for seed in range(3))

    def attend(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        borders = Borders(torch.tensor([0, 50], dtype=torch.int32), torch.tensor([0, last - first]).int(), 50, 50)
        return attend_varlen(query, key[first:last], value[first:last], borders, scaling=None, causal=False)

    whole, weight = attend(0, 50)

    assert torch.allclose(merge(*attend(0, 17), *attend(17, 50)), whole, atol=1e-5 * scale, rtol=0)
    assert torch.allclose(torch.logaddexp(attend(0, 17)[1], attend(17, 50)[1]), weight, atol=1e-3)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_reference_is_scaled_dot_product_attention(window: int | None, key_heads: int) -> None:
    """What stands in for the kernel gives, sequence by sequence, what torch's own attention gives."""
    lengths = (9, 0, 23, 1)
    begins = torch.tensor([0, 9, 9, 32, 33], dtype=torch.int32)
    query, key, value = (
        random_states(33, 4, 16),
        random_states(33, key_heads, 16, seed=1),
        random_states(33, key_heads, 16),
    )

    found, _ = attend_varlen(query, key, value, Borders(begins, begins, 23, 23), scaling=0.3, window=window)

    for begin, length in zip(begins.tolist(), lengths, strict=False):
        own = [states[begin : begin + length].transpose(0, 1) for states in (query, key, value)]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (window or length + 1))
        expected = scaled_dot_product_attention(*own, attn_mask=seen, scale=0.3, enable_gqa=True).transpose(0, 1)
        assert torch.allclose(found[begin : begin + length], expected, atol=1e-6)


def nested_rows(seed: int) -> list[tuple[int, ...]]:
    """Return rows whose beginnings nest three deep, some whole within others, and one stranger."""
    dice = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(1000) for _ in range(count))

    system = tokens(40)
    rows = [system, system[:25] + tokens(5), tokens(30)]
    for _ in range(3):
        prompt = system + tokens(dice.randrange(8, 60))
        rows += [prompt, *(prompt + tokens(dice.randrange(1, 50)) for _ in range(4))]
    rows += [row + tokens(9) for row in rows[-2:]]
    return dice.sample(rows, len(rows))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, 400])
def test_merged_attention_is_attention_to_gathered_keys(seed: int, window: int | None) -> None:
    """However beginnings nest, every token of the row finds what it finds when its sequence's keys are gathered."""
    packing = Packing.of(nested_rows(seed), CPU, shortest_shared=8)
    query = random_states(packing.num_tokens, 4, 16)
    key, value = (random_states(packing.num_tokens, 2, 16, seed=seed) for seed in (1, 2))
    plan = plan_cascade(packing.branches)
    assert plan.holds_for(window)

    merged = attend_cascade(query, key, value, plan, scaling=None, window=window)

    for chunk in packing.chunks:
        borders = Borders(chunk.cu_seqlens_q, chunk.cu_seqlens_k, chunk.max_seqlen_q, chunk.max_seqlen_k)
        gathered = attend_varlen(
            query[slice(*chunk.own)], key[chunk.keys], value[chunk.keys], borders, scaling=None, window=window
        )[0]
        assert torch.allclose(merged[slice(*chunk.own)], gathered, atol=1e-5)


def test_a_beginning_is_read_once_for_all_that_share_it() -> None:
    """A group's beginning has its keys gathered once, not for each completion, and never more than the row at once."""
    prompt = tuple(range(100))
    packing = Packing.of([(*prompt, 200 + place, 7) for place in range(64)], CPU, shortest_shared=8)

    (chunk,) = plan_cascade(packing.branches).prefixes

    assert len(chunk.keys) == 100
    assert len(chunk.places) == sum(branch.num_own for branch in packing.branches if branch.num_shared)
    assert sum(len(gathered.keys) for gathered in packing.chunks) > 60 * 100

    chain = [tuple(range(length)) for length in range(10, 300, 10)]
    packing = Packing.of(chain, CPU, shortest_shared=8)
    for chunk in plan_cascade(packing.branches).prefixes:
        assert len(chunk.keys) <= packing.num_tokens


@pytest.mark.parametrize("family", VARLEN_FAMILIES)
def test_merged_rewards_are_plain_rewards(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """In fp32 the rewards of nested beginnings equal the plain forward one by one within 1e-5."""
    classifier = load_tiny(tiny_checkpoint(family))
    rows = rows_that_share(classifier)
    plain = plain_rewards(classifier, rows)
    monkeypatch.setattr(attention, "_has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(packed, "BLOCK", 1)  # as on CUDA

    output = PackedForward(classifier, cascade=True).run(rows)

    assert output.rewards == pytest.approx(plain, abs=1e-5, rel=0)
    assert sum(output.shared_tokens) > sum(map(len, rows)) / 2


def test_a_window_that_cuts_a_beginning_is_left_to_gathering() -> None:
    """Where a window ends within a sequence some keys are hidden, so the plan does not hold."""
    plan = plan_cascade(Packing.of([tuple(range(50)), (*range(40), 99)], CPU, shortest_shared=8).branches)

    assert plan.holds_for(50)
    assert not plan.holds_for(49)


def test_the_setting_is_refused_on_a_cpu(tiny_checkpoint) -> None:
    """A CPU has no kernel that returns the log-sum-exp, so the start ends with a sentence."""
    with pytest.raises(SettingsError, match="cascade_attention needs a CUDA device"):
        load_torch_engine(
            tiny_checkpoint("llama"),
            ModelSettings(device="cpu", cascade_attention=True),
            BatchingSettings(),
            pad_token_id=0,
            max_input_tokens=99,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_merged_rewards_pass_the_probe_on_cuda(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """On CUDA the kernel's own log-sum-exp merges to rewards that the parity probe accepts and that equal gathering."""
    classifier = load_tiny(tiny_checkpoint(family), dtype, device=torch.device("cuda"))
    rows = rows_that_share(classifier)
    gathered = PackedForward(classifier).run(rows).rewards

    path, parity = probe_and_choose(classifier, "packed", 400, cascade=True)

    assert parity.agrees
    assert path.run(rows).rewards == pytest.approx(gathered, abs=0.1, rel=0)
