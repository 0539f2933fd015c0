"""Options of tiny models with experts, and of hybrids, whose layers are not all attention; see ``tiny_models``."""

from __future__ import annotations

from typing import Any

_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL_EXPERTS: dict[str, Any] = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_DEEPSEEK: dict[str, Any] = {
    **_LATENT,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_GATED_DELTA: dict[str, Any] = {
    **_GROUPED,
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "use_mamba_kernels": False}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL_EXPERTS,
    "phimoe": _LOCAL_EXPERTS,
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "head_dim": 16},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2},
    "mistral4": _DEEPSEEK,
    "jetmoe": {**_LOCAL_EXPERTS, "kv_channels": 16},
    "hunyuan_v1_moe": {**_GROUPED, "num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "minicpm3": _LATENT,
}
"""Decoders with experts, and with latent attention, that run packed."""

PADDED_MIXTURES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        **_LOCAL_EXPERTS,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
"""Decoders with experts whose attention has attention sinks, which the packed path does not compute."""

HYBRIDS: dict[str, dict[str, Any]] = {
    "jamba": {
        **_GROUPED,
        **_MAMBA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "minimax": {
        **_LOCAL_EXPERTS,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "block_size": 32,
    },
    "qwen3_next": {**_GATED_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_5_text": _GATED_DELTA,
    "zamba2": {
        **_MAMBA,
        "num_key_value_heads": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "num_hidden_layers": 6,
        "hybrid_layer_ids": [2, 5],
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "chunk_size": 32,
    },
}
"""Decoders with recurrent or linear-attention layers, which run over whole sequences."""
