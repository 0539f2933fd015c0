"""Merging an adapter gives the model that was trained, or a sentence that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapters import HEAD, write_adapter
from tiny_models import SENTENCES, write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from service.checkpoints.adapter import CONFIG_FILE, WEIGHTS_FILE, is_adapter, merge_adapter
from service.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
"""PEFT, which these tests call directly, reads an attribute that transformers has deprecated."""


def rewards(model: PreTrainedModel | PeftModel, tokenizer_dir: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_causal_lm(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base)


def test_merged_rewards_are_the_adapted_models(tmp_path: Path, base: Path, adapter: Path) -> None:
    """The plain checkpoint gives the rewards of base plus adapter, which differ from each other and from the base's."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    expected = rewards(PeftModel.from_pretrained(plain, adapter), base)

    merged_dir = merge_adapter(adapter, tmp_path / "merged")

    merged = rewards(AutoModelForSequenceClassification.from_pretrained(merged_dir), merged_dir)
    assert merged.shape == (len(SENTENCES), 1)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    assert merged.std() > 0.01


def test_a_merged_folder_is_an_ordinary_checkpoint(tmp_path: Path, adapter: Path) -> None:
    """It has a stored head, one label, a pad token, tokenizer and template, and nothing of PEFT."""
    merged_dir = merge_adapter(adapter, tmp_path / "merged")

    config = json.loads((merged_dir / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    assert load_file(merged_dir / "model.safetensors")["score.weight"].shape[0] == 1
    assert AutoModelForSequenceClassification.from_pretrained(merged_dir).config.num_labels == 1
    assert config["pad_token_id"] == tokenizer.pad_token_id is not None
    assert tokenizer.chat_template
    assert is_adapter(adapter)
    assert not is_adapter(merged_dir)


def test_the_dtype_is_the_bases(tmp_path: Path) -> None:
    """A bf16 base gives a bf16 checkpoint, without a hidden doubling of memory; only the head is fp32."""
    base = write_tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base)

    merged_dir = merge_adapter(adapter, tmp_path / "merged")

    dtypes = {name: tensor.dtype for name, tensor in load_file(merged_dir / "model.safetensors").items()}
    assert dtypes.pop("score.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_given_base_wins_over_the_named_one(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Adapters travel: the path in their configuration is the trainer's, so the caller may say where the base is."""
    rename_base(adapter, "/gone/with/the/training/machine")

    merged_dir = merge_adapter(adapter, tmp_path / "merged", base_dir=base)

    assert (merged_dir / "model.safetensors").is_file()


def rename_base(adapter: Path, name: str | None) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": name}))


def drop_config(adapter: Path) -> None:
    (adapter / CONFIG_FILE).unlink()


def garble_config(adapter: Path) -> None:
    (adapter / CONFIG_FILE).write_text("{")


def pickle_weights(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).rename(adapter / "adapter_model.bin")


def drop_weights(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).unlink()


def garble_weights(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).write_bytes(b"no tensors")


def drop_head(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    del tensors[HEAD]
    save_file(tensors, adapter / WEIGHTS_FILE)


def widen_head(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    tensors[HEAD] = tensors[HEAD].repeat(2, 1)
    save_file(tensors, adapter / WEIGHTS_FILE)


def forget_base(adapter: Path) -> None:
    rename_base(adapter, None)


def lose_base(adapter: Path) -> None:
    rename_base(adapter, "/no/such/folder")


def shrink_weights(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({name: tensor[:, :8].contiguous() for name, tensor in tensors.items()}, adapter / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (drop_config, "is not a PEFT adapter"),
        (garble_config, "is not JSON"),
        (pickle_weights, "is a pickle file"),
        (drop_weights, "copy the whole adapter folder"),
        (garble_weights, "cannot be read"),
        (drop_head, "holds no classification head"),
        (widen_head, "has 2 outputs"),
        (forget_base, "names no base model"),
        (lose_base, "cannot be loaded"),
        (shrink_weights, "does not fit the base model"),
    ],
)
def test_a_bad_adapter_is_refused(
    tmp_path: Path, adapter: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    """Each way of being wrong gets one sentence, and no checkpoint is written."""
    damage(adapter)

    with pytest.raises(CheckpointError, match=complaint):
        merge_adapter(adapter, tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_weights_that_nobody_holds_are_not_made_up(tmp_path: Path, base: Path, adapter: Path) -> None:
    """A base that lacks more than the head would be filled in at random; it is refused by the tensor's name."""
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight"):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_missing_base_folder_is_refused(tmp_path: Path, adapter: Path) -> None:
    """A mistyped base is named as such, and is not taken for a hub id."""
    with pytest.raises(CheckpointError, match="does not exist"):
        merge_adapter(adapter, tmp_path / "merged", base_dir=tmp_path / "typo")
