"""What vLLM is told at its start."""

from __future__ import annotations

from loadtest.vllm_peer import vllm_environment, vllm_flags


def test_the_prefix_cache_is_said_either_way() -> None:
    """Neither choice is left to a default that another version may change."""
    assert "--enable-prefix-caching" in vllm_flags("bfloat16", prefix_cache=True)
    assert "--no-enable-prefix-caching" in vllm_flags("bfloat16", prefix_cache=False)


def test_what_the_caller_has_set_wins() -> None:
    """Another cache or other cores can be tried without a flag of ours, and the report shows what was in force."""
    given = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "0,1", "VLLM_API_KEY": "secret"}

    told = vllm_environment(given, cores={0, 1})

    assert told["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert told["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert told["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_API_KEY" not in told


def test_of_two_cores_both_compute() -> None:
    """A front end with a core to itself slows the peer down; with many cores vLLM binds its threads itself."""
    assert vllm_environment({}, cores={5, 3})["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment({}, cores=range(8))
