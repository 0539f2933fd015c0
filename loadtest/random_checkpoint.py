"""Writes a random reward model of a realistic size, for measurements without a trained one.

Speed depends on shapes, not on trained weights; the rewards have no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loadtest.workload import draw_groups
from service.transformers_logging import transformers_silenced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2Config

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>"}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of a Qwen2 classifier; the default has 24 million parameters."""

    vocabulary: int = 16_384
    hidden: int = 384
    intermediate: int = 1536
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    positions: int = 4096


SHAPES: Mapping[str, ModelShape] = {
    "24M": ModelShape(),
    # The layers of SmolLM2-135M, Qwen2.5-0.5B, Qwen2.5-1.5B and Llama-3-8B.
    "135M": ModelShape(49_152, hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3),
    "0.5B": ModelShape(151_936, hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2),
    "1.5B": ModelShape(151_936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2),
    "8B": ModelShape(128_256, hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8),
}
"""Model sizes by name."""


def write_random_checkpoint(
    folder: Path, shape: ModelShape = ModelShape(), dtype: str = "bfloat16", seed: int = 0, device: str = "cpu"
) -> Path:
    """Write model and tokenizer into a folder and return it.

    The tokenizer is a byte-level BPE trained on the texts of the workload, so that each of its words is one token.

    Args:
        folder: created if it does not exist.
        shape: of the model.
        dtype: of the weights.
        seed: of the weights and of the texts that the tokenizer is trained on.
        device: on which the weights are drawn; a GPU is faster for billions of them and draws different ones.
    """
    import torch
    from transformers import Qwen2ForSequenceClassification

    tokenizer = _train_tokenizer(shape, seed)
    config = _qwen2_config(shape, tokenizer)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = Qwen2ForSequenceClassification(config).to(getattr(torch, dtype))
    with transformers_silenced():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _train_tokenizer(shape: ModelShape, seed: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [text for group in draw_groups(200, 2, seed) for text in (group.prompt, *group.completions)]
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=shape.positions, **SPECIAL_TOKENS)


def _qwen2_config(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
