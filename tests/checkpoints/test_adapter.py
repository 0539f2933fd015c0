"""Merging an adapter gives the model that was trained, or an error with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import HEAD, write_adapter
from tiny_models import SENTENCES, write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from service.checkpoints.adapter import ADAPTER_WEIGHTS_FILE, is_adapter, merge_adapter
from service.checkpoints.files import ADAPTER_CONFIG_FILE
from service.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
"""PEFT, which these tests call directly, reads an attribute that transformers has deprecated."""


def rewards(model: PreTrainedModel | PeftModel, tokenizer_dir: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_causal_lm(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def test_merged_rewards_are_those_of_the_adapted_model(tmp_path: Path, base: Path, adapter: Path) -> None:
    """The plain checkpoint gives the rewards of base plus adapter, which differ between texts."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    expected = rewards(PeftModel.from_pretrained(plain, adapter), base)

    merged_dir = merge_adapter(adapter, tmp_path / "merged")

    merged = rewards(AutoModelForSequenceClassification.from_pretrained(merged_dir), merged_dir)
    assert merged.shape == (len(SENTENCES), 1)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    assert merged.std() > 0.01


def test_a_merged_folder_is_an_ordinary_checkpoint(tmp_path: Path, adapter: Path) -> None:
    """It has a stored head, one label, a pad token, tokenizer and chat template, and no file of PEFT."""
    merged_dir = merge_adapter(adapter, tmp_path / "merged")

    config = json.loads((merged_dir / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    assert load_file(merged_dir / "model.safetensors")["score.weight"].shape[0] == 1
    assert AutoModelForSequenceClassification.from_pretrained(merged_dir).config.num_labels == 1
    assert config["pad_token_id"] == tokenizer.pad_token_id is not None
    assert tokenizer.chat_template
    assert is_adapter(adapter)
    assert not is_adapter(merged_dir)


def test_the_merged_dtype_is_that_of_the_base(tmp_path: Path) -> None:
    """A bf16 base gives a bf16 checkpoint, which needs no more memory; only the head is fp32."""
    base = write_tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base)

    merged_dir = merge_adapter(adapter, tmp_path / "merged")

    dtypes = {name: tensor.dtype for name, tensor in load_file(merged_dir / "model.safetensors").items()}
    assert dtypes.pop("score.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_given_base_overrides_the_one_in_the_config(tmp_path: Path, base: Path, adapter: Path) -> None:
    """The path in an adapter's configuration is one of the training machine, so the caller may pass another one."""
    rename_base(adapter, "/gone/with/the/training/machine")

    merged_dir = merge_adapter(adapter, tmp_path / "merged", base_dir=base)

    assert (merged_dir / "model.safetensors").is_file()


def rename_base(adapter: Path, name: str | None) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG_FILE).read_text())
    (adapter / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": name}))


def remove_config(adapter: Path) -> None:
    (adapter / ADAPTER_CONFIG_FILE).unlink()


def damage_config(adapter: Path) -> None:
    (adapter / ADAPTER_CONFIG_FILE).write_text("{")


def pickle_weights(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS_FILE).rename(adapter / "adapter_model.bin")


def remove_weights(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS_FILE).unlink()


def damage_weights(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS_FILE).write_bytes(b"no tensors")


def remove_head(adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    del tensors[HEAD]
    save_file(tensors, adapter / ADAPTER_WEIGHTS_FILE)


def widen_head(adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    tensors[HEAD] = tensors[HEAD].repeat(2, 1)
    save_file(tensors, adapter / ADAPTER_WEIGHTS_FILE)


def remove_base_name(adapter: Path) -> None:
    rename_base(adapter, None)


def name_missing_base(adapter: Path) -> None:
    rename_base(adapter, "/no/such/folder")


def become_prompt_tuning(adapter: Path) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG_FILE).read_text())
    (adapter / ADAPTER_CONFIG_FILE).write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))


def leave_merged_weights(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS_FILE).rename(adapter / "model.safetensors")


def shrink_weights(adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    save_file({name: tensor[:, :8].contiguous() for name, tensor in tensors.items()}, adapter / ADAPTER_WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "is not a PEFT adapter"),
        (damage_config, "cannot be read as JSON"),
        (pickle_weights, "is a pickle file"),
        (remove_weights, "copy the whole adapter folder"),
        (damage_weights, "cannot be read"),
        (remove_head, "has no classification head"),
        (become_prompt_tuning, "PROMPT_TUNING adapter: .* cannot be merged"),
        (leave_merged_weights, r"delete adapter_config\.json"),
        (widen_head, "has 2 outputs"),
        (remove_base_name, "names no base model"),
        (name_missing_base, "cannot be loaded"),
        (shrink_weights, "does not match the base model"),
    ],
)
def test_a_bad_adapter_is_refused(tmp_path: Path, adapter: Path, damage: Callable[[Path], None], message: str) -> None:
    """Each kind of damage has its own message, and no checkpoint is written."""
    damage(adapter)

    with pytest.raises(CheckpointError, match=message):
        merge_adapter(adapter, tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_a_weight_that_is_in_neither_file_is_not_initialised_at_random(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """A base that lacks more than the head is refused, with the tensor's name."""
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"has model\.norm\.weight"):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_missing_base_folder_is_refused(tmp_path: Path, adapter: Path) -> None:
    """A mistyped folder of the base is reported, and not treated as a hub id."""
    with pytest.raises(CheckpointError, match="does not exist"):
        merge_adapter(adapter, tmp_path / "merged", base_dir=tmp_path / "typo")


def test_an_adapter_of_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    """LoRA on a reward model, without a head of its own, gives the rewards of PEFT with the base's head."""
    base = write_tiny_checkpoint(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = rewards(adapted, base)

    merged_dir = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base_dir=base)

    merged = rewards(AutoModelForSequenceClassification.from_pretrained(merged_dir), merged_dir)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)


def test_an_adapter_with_added_tokens_is_merged(tmp_path: Path, base: Path) -> None:
    """Where training added a token, the base gets the embedding's rows that the adapter stores."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    num_rows = model.get_input_embeddings().num_embeddings + 1
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    rename_base(tmp_path / "adapter", str(base))
    expected = rewards(adapted, base)

    merged_dir = merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    merged = AutoModelForSequenceClassification.from_pretrained(merged_dir)
    assert merged.get_input_embeddings().num_embeddings == num_rows
    torch.testing.assert_close(rewards(merged, merged_dir), expected, atol=1e-4, rtol=0)
