"""Flags and environment with which vLLM is started."""

from __future__ import annotations

from loadtest.vllm_peer import vllm_environment, vllm_flags


def test_the_prefix_cache_is_set_explicitly() -> None:
    """Neither choice depends on a default that another version may change."""
    assert "--enable-prefix-caching" in vllm_flags("bfloat16", prefix_cache=True)
    assert "--no-enable-prefix-caching" in vllm_flags("bfloat16", prefix_cache=False)


def test_variables_of_the_caller_win() -> None:
    """Another cache size or other cores can be tried without a flag, and the report has the variables in force."""
    given = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "0,1", "VLLM_API_KEY": "secret"}

    variables = vllm_environment(given, cores={0, 1})

    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert "VLLM_API_KEY" not in variables


def test_two_cores_both_compute() -> None:
    """On two cores the threads are bound to both; with more cores vLLM binds them itself."""
    assert vllm_environment({}, cores={5, 3})["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment({}, cores=range(8))
