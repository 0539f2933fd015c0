"""With the prefix cache a prompt is computed once for all passes, and rewards do not change."""

from __future__ import annotations

import gc
import random
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
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

from service.checkpoints.configuration import read_config
from service.engines.attention import prefix_index
from service.engines.attention.kv_cache import KVCache
from service.engines.model.classifier import Classifier
from service.engines.parity import plain_rewards
from service.engines.paths.packed import MIN_SHARED_TOKENS, PackedForward
from service.engines.plan import PREFIX_CACHE_MIB
from service.engines.torch import TorchEngine, load_torch_engine
from service.records import StateTap, TokenSequence
from service.scheduling.budget import BatchBudget
from service.scheduling.prefix_tree import common_prefix_length, plan_prefix_sharing
from service.settings import BatchingSettings, ModelSettings
from service.warm_up import warm_up

LARGE_CACHE = 2**22
MEAN_OF_ALL_LAYERS = tuple(StateTap(layer, pooling) for layer in range(4) for pooling in ("last", "mean"))

Rows = list[tuple[int, ...]]


def path_with_cache(classifier: Classifier, cache_bytes: int = LARGE_CACHE, *, compiled: bool = False) -> PackedForward:
    """Return a path whose pool is allocated and empty."""
    path = packed_path(classifier, cache_bytes=cache_bytes, compiled=compiled)
    path.run([(7, 8, 9)], prompts=[None])
    return path


def prompts_of(rows: Rows, seed: int) -> list[int | None]:
    """Draw where the prompts end: anywhere, at the end, or unknown."""
    dice = random.Random(seed)
    return [dice.choice([None, dice.randrange(len(row) + 1), len(row) // 2, len(row)]) for row in rows]


def load(folder: Path, taps: tuple[StateTap, ...] = (), dtype: str = "float32", **batching: object) -> TorchEngine:
    return load_torch_engine(
        folder,
        ModelSettings.model_validate({"device": "cpu", "dtype": dtype, "num_threads": 1}),
        BatchingSettings.model_validate(batching),
        pad_token_id=read_config(folder).get_text_config().pad_token_id,
        max_input_tokens=400,
        taps=taps,
    )


def answers(classifier: Classifier, num_answers: int = 3, prompt_tokens: int = 40) -> list[TokenSequence]:
    """Return answers to one prompt."""
    prompt, *completions = random_rows(classifier, lengths=(prompt_tokens, *range(9, 9 + num_answers)))
    return [TokenSequence(prompt + completion, prompt_tokens) for completion in completions]


# --- Rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_cached_prefixes_do_not_change_a_bit_in_bf16(tiny_checkpoint, family: str) -> None:
    """A text's bf16 reward on a CPU is bit-identical alone and in any batch, whatever earlier passes have cached.

    It is so where all prompts fit the cache and where they evict each other: not cached, cached, and evicted.
    """
    classifier = load_tiny(tiny_checkpoint(family, hidden_size=192, intermediate_size=576), torch.bfloat16)
    rows = rows_that_share(classifier)
    plain = packed_path(classifier, share_prefixes=False)
    alone = {row: plain.run([row]).rewards[0] for row in rows}

    for cache_bytes in (LARGE_CACHE, LARGE_CACHE // 32):
        path = path_with_cache(classifier, cache_bytes)
        num_cached_tokens = 0
        for seed in range(4):
            for batch in shuffled_batches(rows, seed):
                output = path.run(batch, prompts=prompts_of(batch, seed))
                num_cached_tokens += output.cached_tokens
                assert output.rewards == [alone[row] for row in batch]
        assert num_cached_tokens > 0


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_warm_rewards_are_plain_transformers_rewards(tiny_checkpoint, family: str) -> None:
    """In fp32 rewards from cached prompts equal the plain forward one by one, also with pads after the pooled token."""
    classifier = load_tiny(tiny_checkpoint(family, pad_is_eos=True))
    shared = rows_that_share(classifier)
    rows = list(dict.fromkeys([*shared, *with_pad(classifier, shared), *rows_with_endings(classifier)]))
    plain = plain_rewards(classifier, rows)
    path = path_with_cache(classifier)

    cold = path.run(rows, prompts=prompts_of(rows, 0))
    warm = path.run(rows, prompts=prompts_of(rows, 1))

    assert cold.cached_tokens == 0 < warm.cached_tokens
    assert cold.rewards == pytest.approx(plain, abs=1e-5, rel=0)
    assert warm.rewards == pytest.approx(plain, abs=1e-5, rel=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_long_cached_prompts_do_not_change_a_bit_in_bf16(tiny_checkpoint, family: str) -> None:
    """The same holds where hundreds of keys are out of the window, and where a prompt ends within a cached one."""
    classifier = load_tiny(tiny_checkpoint(family, max_position_embeddings=2048, sliding_window=300), torch.bfloat16)
    long, other = random_rows(classifier, lengths=(1150, 700))
    rows = [long, long[:1100] + other[:9], long[:610] + other, long[:33] + other[:5], long[:1100]]
    plain = packed_path(classifier, share_prefixes=False)
    path = path_with_cache(classifier, 2**25)

    for row in rows:
        output = path.run([row], prompts=[1100])
        assert output.rewards == plain.run([row]).rewards
    assert output.cached_tokens == 1099


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.slow
def test_compiled_blocks_use_the_cache(tiny_checkpoint) -> None:
    """In compiled blocks too, a cached prompt changes no bit of a bf16 reward on a CPU."""
    torch.compiler.reset()
    classifier = load_tiny(tiny_checkpoint("llama", hidden_size=192, intermediate_size=576), torch.bfloat16)
    rows = rows_that_share(classifier)
    path = path_with_cache(classifier, compiled=True)
    alone = {row: path.run([row]).rewards[0] for row in rows}

    path.run(rows, prompts=prompts_of(rows, 0))
    warm = path.run(rows, prompts=prompts_of(rows, 1))

    assert warm.cached_tokens > 0
    assert warm.rewards == [alone[row] for row in rows]


# --- What is cached --------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_for_all_its_answers(tiny_checkpoint) -> None:
    """In a later pass the whole prompt of another answer is counted as shared and as cached."""
    folder = tiny_checkpoint("llama")
    first, second, third = answers(load_tiny(folder))
    engine = load(folder)

    outputs = [engine.forward([first]), engine.forward([second, third])]

    assert [(list(output.shared_tokens), output.cached_tokens) for output in outputs] == [([0], 0), ([40, 40], 80)]


def test_a_prompt_of_unknown_length_is_cached_where_a_pass_shares_it(tiny_checkpoint) -> None:
    """Without a known prompt one sequence alone caches nothing; the shared prefix of two serves a third."""
    folder = tiny_checkpoint("llama")
    first, second, third = (replace(answer, num_prompt_tokens=None) for answer in answers(load_tiny(folder)))
    engine = load(folder)

    cached = [engine.forward(batch).cached_tokens for batch in ([first], [third], [first, second], [third])]

    assert cached == [0, 0, 0, 40]


def test_short_prompts_are_not_cached(tiny_checkpoint) -> None:
    """A prompt shorter than the shortest shared prefix is not cached."""
    folder = tiny_checkpoint("llama")
    first, second, third = answers(load_tiny(folder), prompt_tokens=MIN_SHARED_TOKENS - 1)
    engine = load(folder)

    assert [engine.forward([answer]).cached_tokens for answer in (first, second, third)] == [0, 0, 0]


def test_the_engine_reports_beforehand_what_it_need_not_compute(tiny_checkpoint) -> None:
    """``num_cached_tokens`` is what the next pass leaves out: no pooled token, and none whose state may be read."""
    folder = tiny_checkpoint("llama")
    first, second, _ = answers(load_tiny(folder))
    whole_prompt = TokenSequence(first.token_ids[:40], 40)
    plain, tapped = load(folder), load(folder, MEAN_OF_ALL_LAYERS)
    for engine in (plain, tapped):
        assert engine.num_cached_tokens(second) == 0
        engine.forward([first])

    requests = [second, whole_prompt, replace(second, num_prompt_tokens=None), replace(second, num_prompt_tokens=20)]
    assert [plain.num_cached_tokens(sequence) for sequence in requests] == [40, 39, 40, 40]
    assert [tapped.num_cached_tokens(sequence) for sequence in requests] == [40, 0, 0, 20]
    assert plain.num_cached_tokens(TokenSequence(())) == 0
    for sequence in requests:
        assert plain.forward([sequence]).cached_tokens == plain.num_cached_tokens(sequence)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_states_are_read_as_without_a_cache(tiny_checkpoint, family: str) -> None:
    """Means over completions and last states at every layer are those of an engine without a cache, warm or cold."""
    folder = tiny_checkpoint(family)
    rows = rows_that_share(load_tiny(folder))
    engine, uncached = load(folder, MEAN_OF_ALL_LAYERS), load(folder, MEAN_OF_ALL_LAYERS, prefix_cache_mib=0)
    num_cached_tokens = 0
    for seed in range(3):
        for batch in shuffled_batches(rows, seed):
            sequences = [TokenSequence(*known) for known in zip(batch, prompts_of(batch, seed), strict=True)]

            output, expected = engine.forward(sequences, states=True), uncached.forward(sequences, states=True)

            num_cached_tokens += output.cached_tokens
            assert output.states is not None
            assert expected.states is not None
            assert np.allclose(output.states, expected.states, atol=1e-4, rtol=0)
            assert list(output.rewards) == pytest.approx(list(expected.rewards), abs=1e-5, rel=0)
    assert num_cached_tokens > 0


def test_sequences_beyond_the_longrope_limit_do_not_use_the_cache(tiny_checkpoint) -> None:
    """With longrope scaling a long answer to a cached prompt has the frequencies of long texts from its first token."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    }
    folder = tiny_checkpoint("phi3", rope_parameters=scaling, original_max_position_embeddings=64)
    prompt, short, long = random_rows(load_tiny(folder), lengths=(40, 10, 80))
    sequences = [TokenSequence(prompt + completion, 40) for completion in (short, long)]
    alone = [load(folder, prefix_cache_mib=0).forward([sequence]).rewards[0] for sequence in sequences]
    engine = load(folder)

    outputs = [engine.forward([sequence]) for sequence in (*sequences, *sequences)]

    assert [output.cached_tokens for output in outputs] == [0, 0, 40, 0]
    assert [output.rewards[0] for output in outputs] == pytest.approx([*alone, *alone], abs=1e-5, rel=0)
    assert engine.num_cached_tokens(sequences[1]) == 0


def test_warm_up_caches_nothing(tiny_checkpoint) -> None:
    """The synthetic batches of the warm-up are never requested again, and none of them is cached."""
    engine = load(tiny_checkpoint("llama"))

    warm_up(engine, BatchBudget("packed", 512, 16), range(5, 200))

    assert isinstance(engine._path, PackedForward)
    assert engine._path.kv_cache is not None
    assert engine._path.kv_cache.prefix_index.num_tokens == 0


def test_a_closed_engine_frees_its_cache(tiny_checkpoint) -> None:
    """After ``close`` the pool is garbage-collected, and nothing is reported as cached."""
    folder = tiny_checkpoint("llama")
    first, second, _ = answers(load_tiny(folder))
    engine = load(folder)
    engine.forward([first])
    assert isinstance(engine._path, PackedForward)
    assert engine._path.kv_cache is not None
    cache = weakref.ref(engine._path.kv_cache)

    engine.close()

    assert engine.num_cached_tokens(second) == 0
    gc.collect()
    assert cache() is None


# --- What must not be cached -----------------------------------------------------------------------------------------


def test_a_failed_pass_caches_nothing(tiny_checkpoint) -> None:
    """The prefixes that a failed pass added are rolled back; later passes are as if it had not run."""
    classifier = load_tiny(tiny_checkpoint("llama"), torch.bfloat16)
    first, second, third = (answer.token_ids for answer in answers(classifier))
    path = path_with_cache(classifier)

    def fail(*_: object) -> None:
        raise RuntimeError("injected failure")

    handle = classifier.blocks[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="injected failure"):
        path.run([first], prompts=[40])
    handle.remove()

    assert path.kv_cache is not None
    assert path.kv_cache.prefix_index.num_tokens == 0
    assert path.run([second], prompts=[40]).cached_tokens == 0
    assert path.run([third], prompts=[40]).rewards == packed_path(classifier).run([third]).rewards


def test_an_uncommitted_transaction_is_rolled_back() -> None:
    """Slots reserved by ``begin`` are freed when the context ends without a commit, and stay reserved with one."""
    cache = KVCache(max_bytes=1024, min_tokens=2)
    states = torch.ones(1, 1, 6, 4)
    cache.allocate([(states, states)])
    sequence = (1, 2, 3, 4, 5, 6)

    def run_pass(*, commit: bool) -> int:
        cached = cache.lookup([sequence], [5])
        layouts = plan_prefix_sharing([sequence], 2, cached.spans)
        with cache.begin(cached, [sequence], layouts, [4], torch.device("cpu")) as transaction:
            transaction.append(states, states)
            assert cache.prefix_index.num_tokens == 4
            if commit:
                transaction.commit()
        return cached.num_saved

    assert (run_pass(commit=False), cache.prefix_index.num_tokens) == (0, 0)
    assert (run_pass(commit=True), cache.prefix_index.num_tokens) == (0, 4)
    assert run_pass(commit=False) == 4
    assert cache.prefix_index.num_tokens == 4


def test_a_pass_reuses_the_lookup_of_the_queue(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is compared with the cached prefixes when its cost is computed, and not again by its pass."""
    folder = tiny_checkpoint("llama")
    first, second, _ = answers(load_tiny(folder))
    engine = load(folder)
    engine.forward([first])
    compared: list[tuple[int, ...]] = []

    def counting(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        compared.append(other)
        return common_prefix_length(one, other)

    monkeypatch.setattr(prefix_index, "common_prefix_length", counting)

    assert engine.num_cached_tokens(second) == 40
    assert engine.forward([second]).cached_tokens == 40
    assert compared.count(second.token_ids) == 1


def test_states_that_are_not_finite_are_not_cached(tiny_checkpoint) -> None:
    """A text whose reward is not finite caches no prompt, even one that it shares with sound texts."""
    classifier = load_tiny(tiny_checkpoint("llama"), torch.bfloat16)
    nan_token = 5
    with torch.no_grad():
        classifier.model.get_input_embeddings().weight[nan_token] = torch.nan
    sound = tuple(6 if token == nan_token else token for token in answers(classifier)[0].token_ids)
    bad = (*sound[:40], nan_token, 9)
    path = path_with_cache(classifier)
    alone = packed_path(classifier).run([sound]).rewards

    together = path.run([sound, bad], prompts=[40, 40])

    assert path.kv_cache is not None
    assert path.kv_cache.prefix_index.num_tokens == 0
    assert together.rewards[0] == alone[0]
    assert path.run([sound], prompts=[40]).rewards == alone
    assert path.run([bad, sound], prompts=[40, 40]).rewards[1] == alone[0]
    assert path.run([sound], prompts=[40]).cached_tokens == 40
    assert path.run([sound], prompts=[40]).rewards == alone


def test_a_prompt_with_nan_states_is_not_cached_despite_a_finite_reward(tiny_checkpoint) -> None:
    """A NaN outside the sliding window of the pooled token is detected in the states themselves."""
    folder = tiny_checkpoint("mistral", num_hidden_layers=1, max_position_embeddings=2048)
    classifier = load_tiny(folder, torch.bfloat16)
    nan_token = 5
    with torch.no_grad():
        classifier.model.get_input_embeddings().weight[nan_token] = torch.nan
    (row,) = random_rows(classifier, lengths=(1300,))
    row = (nan_token, *(6 if token == nan_token else token for token in row[1:]))
    path = path_with_cache(classifier)

    output = path.run([row], prompts=[40])

    assert output.rewards[0] == output.rewards[0]
    assert path.kv_cache is not None
    assert path.kv_cache.prefix_index.num_tokens == 0


# --- Settings --------------------------------------------------------------------------------------------------------


def test_prompts_are_cached_on_a_cpu_unless_a_setting_disables_it(tiny_checkpoint) -> None:
    """512 MiB by default; ``deterministic``, no shared prefixes, a padded path and zero disable the cache."""
    folder = tiny_checkpoint("llama")

    assert load(folder).info.prefix_cache_mib == PREFIX_CACHE_MIB["cpu"] == 512
    assert load(folder, prefix_cache_mib=3).info.prefix_cache_mib == 3
    assert load(tiny_checkpoint("bert")).info.prefix_cache_mib == 0
    for off in ({"deterministic": True}, {"share_prefixes": False}, {"prefix_cache_mib": 0}):
        engine = load(folder, **off)
        assert engine.info.prefix_cache_mib == 0
        assert [engine.forward([answer]).cached_tokens for answer in answers(load_tiny(folder))] == [0, 0, 0]


def test_the_pool_has_the_size_of_the_setting(tiny_checkpoint) -> None:
    """Keys and values of all layers together stay within the budget, and leave less than one token of it."""
    path = path_with_cache(load_tiny(tiny_checkpoint("gemma3")), cache_bytes=1_000_000)

    assert path.kv_cache is not None
    tensors = [states for pair in path.kv_cache.layers for states in pair]
    num_slots = {len(states) for states in tensors}
    size = sum(states.numel() * states.element_size() for states in tensors)
    assert len(num_slots) == 1
    assert 0 <= 1_000_000 - size < size / num_slots.pop()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_pool_occupies_no_memory_before_it_is_used(tiny_checkpoint) -> None:
    """A pool of half a GiB adds next to nothing to the resident memory of the process at start."""
    folder = tiny_checkpoint("llama")
    load(folder, prefix_cache_mib=0)

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    before = resident_mib()
    engine = load(folder)

    assert engine.info.prefix_cache_mib == 512
    assert resident_mib() - before < 200


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_prompts_change_a_reward_on_cuda_by_rounding_only(tiny_checkpoint, dtype: str) -> None:
    """On CUDA a warm reward equals a cold one within the rounding of its arithmetic."""
    folder = tiny_checkpoint("llama")
    rows = rows_that_share(load_tiny(folder))
    path = path_with_cache(load_tiny(folder, getattr(torch, dtype), device=torch.device("cuda")))

    cold = path.run(rows, prompts=prompts_of(rows, 0))
    warm = path.run(rows, prompts=prompts_of(rows, 1))

    assert warm.cached_tokens > 0
    assert warm.rewards == pytest.approx(cold.rewards, abs=1e-4 if dtype == "float32" else 0.1, rel=0)
