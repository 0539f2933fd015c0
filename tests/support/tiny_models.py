"""Tiny random reward-model checkpoints, one per architecture family, written as ordinary folders.

They have the files of a real checkpoint (weights, config, trained tokenizer, chat template) and 120,000 weights, so
a test loads one in a fraction of a second. The weights are random, with a variance large enough for every token to
affect the reward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_mixtures import HYBRIDS, MIXTURES, PADDED_MIXTURES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from service.transformers_logging import transformers_silenced

DECODER_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2")
ENCODER_FAMILIES = ("bert", "deberta-v2", "modernbert")
FAMILIES = DECODER_FAMILIES + ENCODER_FAMILIES

FAMILIES_WITH_BOS = frozenset({"llama", "mistral", "gemma2", "gemma3"})
"""Decoder families whose tokenizers prepend a BOS token; the others have none, as in the real families."""

MAX_POSITIONS = 512

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "How do I boil an egg? Put it into boiling water for seven minutes, then cool it.",
    "Please write a short poem about the sea, the wind and an old ship.",
    "I am sorry, but I cannot help with that. Is there anything else that you would like to know?",
    "def add(a, b):\n    return a + b  # adds two numbers: 1 + 2 = 3",
    "user assistant system question answer prompt completion reward model human preference",
)

CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def write_tiny_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    pad_is_eos: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config_overrides: Any,
) -> Path:
    """Write a random one-label classifier of the family, with its tokenizer, into ``folder`` and return the folder.

    ``config_overrides`` take precedence over the family's values.
    """
    tokenizer = tiny_tokenizer(family, pad_is_eos=pad_is_eos)
    config = tiny_config(family, tokenizer, **({"num_labels": 1} | config_overrides))
    model = build_model(AutoModelForSequenceClassification, config, seed)
    _save(folder, model.to(dtype), tokenizer)
    return folder


def write_tiny_causal_lm(folder: Path, family: str = "llama", *, seed: int = 0, **config_overrides: Any) -> Path:
    """Write a random causal language model of a decoder family, with its tokenizer; it has no scalar head."""
    tokenizer = tiny_tokenizer(family)
    config = tiny_config(family, tokenizer, **config_overrides)
    _save(folder, build_model(AutoModelForCausalLM, config, seed), tokenizer)
    return folder


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> PretrainedConfig:
    """The configuration of a tiny model of the family, with the tokenizer's special tokens."""
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model_type = {"gemma3": "gemma3_text"}.get(family, family)
    return AutoConfig.for_model(model_type, **(shape | _FAMILY_OPTIONS[family] | overrides))


# The differences of the families: grouped-query attention, head size, windows and special tokens.
_GROUPED_HEADS: dict[str, Any] = {"num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {
    **_GROUPED_HEADS,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED_HEADS,
    "qwen2": _GROUPED_HEADS,
    "qwen3": {**_GROUPED_HEADS, "head_dim": 16},
    "mistral": {**_GROUPED_HEADS, "sliding_window": 16},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": {**_GROUPED_HEADS, "sliding_window": 16},
    "olmo2": _GROUPED_HEADS,
    "gpt_neox": {},
    "bert": {},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 32,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
    },
    "modernbert": {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
    **MIXTURES,
    **PADDED_MIXTURES,
    **HYBRIDS,
    "doge": {**_GROUPED_HEADS, "head_dim": 16, "is_moe": True, "num_experts": 4, "num_experts_per_tok": 2},
}


def build_model(auto_class: Any, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Build a model with reproducible random weights, its scalar head scaled so that rewards spread by about one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if name in {"score.weight", "classifier.weight"}:
                # A decoder's last state has unit scale; an encoder's is squashed, so its head has larger weights.
                width = 1.0 if name == "score.weight" else 3.0
                torch.nn.init.normal_(weight, std=width * weight.shape[-1] ** -0.5)
    return model.eval()


def tiny_tokenizer(family: str, *, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer trained on a few sentences: byte-level BPE for decoders, WordPiece (CLS, SEP) for encoders."""
    if family in ENCODER_FAMILIES:
        return _encoder_tokenizer()
    # Transformers adds this padding token to Qwen's tokenizers in any case.
    pad = "<|endoftext|>" if family.startswith("qwen") else PAD
    return _decoder_tokenizer(pad, with_bos=family in FAMILIES_WITH_BOS, pad_is_eos=pad_is_eos)


def _decoder_tokenizer(pad: str, *, with_bos: bool, pad_is_eos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[pad, BOS, EOS, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS if with_bos else None,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else pad,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _encoder_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - a token of text, not a password
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special_tokens, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",  # noqa: S106 - a token of text, not a password
        pad_token="[PAD]",  # noqa: S106 - a token of text, not a password
        cls_token="[CLS]",  # noqa: S106 - a token of text, not a password
        sep_token="[SEP]",  # noqa: S106 - a token of text, not a password
        mask_token="[MASK]",  # noqa: S106 - a token of text, not a password
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with transformers_silenced():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def refuse_system_messages(checkpoint: Path) -> None:
    """Make the chat template of a checkpoint raise on a system message, as Gemma's does."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = guard + tokenizer.chat_template
    tokenizer.save_pretrained(checkpoint)
