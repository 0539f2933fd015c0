"""A valid checkpoint is opened; an invalid one is refused with one sentence that names the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES,
    MAX_POSITIONS,
    build_model,
    tiny_config,
    tiny_tokenizer,
    write_tiny_causal_lm,
    write_tiny_checkpoint,
)
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import service.checkpoints.checkpoint
from service.checkpoints.checkpoint import Checkpoint, describe, locate_checkpoint, model_version, open_checkpoint
from service.errors import CheckpointError
from service.settings import ModelSettings


def opened(folder: Path, **settings: Any) -> Checkpoint:
    return open_checkpoint(folder, ModelSettings(path=str(folder), **settings))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_bytes())
    edit(content)
    file.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_valid_checkpoint_is_opened(family: str, tmp_path: Path) -> None:
    """A plain classifier of each family is accepted, and its record has the properties of the written model."""
    write_tiny_checkpoint(tmp_path, family)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)

    checkpoint = opened(tmp_path)

    assert checkpoint.architecture == type(model).__name__
    assert checkpoint.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert checkpoint.embedding_size == model.get_input_embeddings().num_embeddings
    assert checkpoint.pad_token_id == model.config.pad_token_id == checkpoint.tokenizer.pad_token_id
    assert checkpoint.max_input_tokens == MAX_POSITIONS
    assert checkpoint.dtype == "F32"
    assert checkpoint.name == tmp_path.name
    assert checkpoint.notes == ()


def test_a_sharded_checkpoint_is_opened(tmp_path: Path) -> None:
    """Weights in several files with an index are one checkpoint."""
    model = build_model(
        AutoModelForSequenceClassification, tiny_config("llama", tiny_tokenizer("llama"), num_labels=1), 0
    )
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_tokenizer("llama").save_pretrained(tmp_path)

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert opened(tmp_path).num_parameters == model.num_parameters()


# Each of these functions makes a valid checkpoint folder invalid.


def no_folder(folder: Path) -> None:
    """The folder is empty."""
    for file in folder.iterdir():
        file.unlink()


def no_config(folder: Path) -> None:
    """The config was not copied."""
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    """The config was cut off while copying."""
    (folder / "config.json").write_text('{"model_type": ')


def unknown_architecture(folder: Path) -> None:
    """Transformers does not support the model type."""
    edit_json(folder / "config.json", lambda config: config.update(model_type="no-such-thing"))


def wrong_type_in_config(folder: Path) -> None:
    """A value of the config is of a type that the architecture does not accept."""
    edit_json(folder / "config.json", lambda config: config.update(max_position_embeddings="many"))


def no_classifier_architecture(folder: Path) -> None:
    """The architecture exists, but has no sequence classifier."""
    edit_json(folder / "config.json", lambda config: config.update(model_type="vit"))


def encoder_decoder(folder: Path) -> None:
    """The architecture reads one text and writes another."""
    (folder / "config.json").write_text(json.dumps({"model_type": "bart", "num_labels": 1}))


def remote_code(folder: Path) -> None:
    """The config requires code from the folder."""
    edit_json(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "modeling.Mine"}))


def remote_tokenizer_code(folder: Path) -> None:
    """The tokenizer requires code from the folder."""
    edit_json(
        folder / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["mine.T", None]})
    )


def quantized(folder: Path) -> None:
    """The weights were quantized by a library."""
    edit_json(
        folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"})
    )


def no_weights(folder: Path) -> None:
    """The weights were not copied."""
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    """The weights are stored as a pickle only."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def missing_shard(folder: Path) -> None:
    """The index lists a file that was not copied."""
    index = {"weight_map": {"score.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def broken_index(folder: Path) -> None:
    """The index is a JSON list."""
    (folder / "model.safetensors.index.json").write_text("[]")
    (folder / "model.safetensors").unlink()


def truncated_weights(folder: Path) -> None:
    """The download of the weights stopped early."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pointer_instead_of_weights(folder: Path) -> None:
    """The weights file is a Git LFS pointer."""
    (folder / "model.safetensors").write_text("version https://example.org/spec/v1\nsize 1234\n")


def causal_lm(folder: Path) -> None:
    """The policy was saved instead of the reward model."""
    write_tiny_causal_lm(folder)


def bare_model(folder: Path) -> None:
    """The body was saved without its head."""
    build_model(AutoModel, tiny_config("llama", tiny_tokenizer("llama")), 0).save_pretrained(folder)


def trl_value_head(folder: Path) -> None:
    """The head is TRL's value head."""
    head = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    edit_weights(folder, lambda weights: (weights.pop("score.weight"), weights.update(head)))


def openrlhf_value_head(folder: Path) -> None:
    """The head has OpenRLHF's prefix."""
    edit_weights(folder, lambda weights: weights.update({"value_head.weight": weights.pop("score.weight")}))


def separate_value_head(folder: Path) -> None:
    """The head is in a separate file."""
    head = {"v_head.summary.weight": torch.ones(1, 64)}
    edit_weights(folder, lambda weights: weights.pop("score.weight"))
    save_file(head, folder / "value_head.safetensors")


def pickled_value_head(folder: Path) -> None:
    """The head is in a separate pickle."""
    edit_weights(folder, lambda weights: weights.pop("score.weight"))
    torch.save({"v_head.summary.weight": torch.ones(1, 64)}, folder / "value_head.bin")


def missing_layer(folder: Path) -> None:
    """One weight of the body is missing."""
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def three_labels(folder: Path) -> None:
    """It is a classifier of three classes."""
    build_model(
        AutoModelForSequenceClassification, tiny_config("llama", tiny_tokenizer("llama"), num_labels=3), 0
    ).save_pretrained(folder)


def default_label_count(folder: Path) -> None:
    """The head has one output, but the config has transformers' default of two labels."""
    edit_json(folder / "config.json", lambda config: (config.pop("id2label"), config.pop("label2id")))


def other_vocabulary(folder: Path) -> None:
    """Config and weights come from different models."""
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=500))


def head_of_another_model(folder: Path) -> None:
    """The head belongs to a model with another hidden size."""
    edit_weights(folder, lambda weights: weights.update({"score.weight": torch.ones(1, 32)}))


def nan_weight(folder: Path) -> None:
    """Training diverged."""
    edit_weights(folder, lambda weights: weights["model.norm.weight"].fill_(torch.nan))


def infinite_weight(folder: Path) -> None:
    """A weight overflowed when it was cast to fp16."""

    def overflow(weights: dict[str, torch.Tensor]) -> None:
        weights["score.weight"] = (weights["score.weight"] * 1e6).half()

    edit_weights(folder, overflow)


def no_tokenizer(folder: Path) -> None:
    """The tokenizer was not copied."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def slow_tokenizer(folder: Path) -> None:
    """There is a tokenizer, but not the fast one."""
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    """The fast tokenizer does not parse."""
    (folder / "tokenizer.json").write_text("{}")


def larger_tokenizer(folder: Path) -> None:
    """Tokens were added without resizing the embedding."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_tokens(["<more>", "<and more>"])
    tokenizer.save_pretrained(folder)


def no_pad_token(folder: Path) -> None:
    """Neither config nor tokenizer has a pad token."""
    edit_json(folder / "config.json", lambda config: config.update(pad_token_id=None))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(pad_token=None))


def pad_token_outside(folder: Path) -> None:
    """The pad token has no row in the embedding, as with the -1 of early Llama configs."""
    edit_json(folder / "config.json", lambda config: config.update(pad_token_id=-1))


def no_limit(folder: Path) -> None:
    """Neither model nor tokenizer has a token limit."""
    config = AutoConfig.for_model(
        "bloom", vocab_size=400, hidden_size=64, n_layer=1, n_head=4, num_labels=1, pad_token_id=0
    )
    build_model(AutoModelForSequenceClassification, config, 0).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("model_max_length"))


REMEDIES: dict[Callable[[Path], None], str] = {
    no_folder: "pass the folder that save_pretrained wrote",
    no_config: "pass the folder that save_pretrained wrote",
    broken_config: "copy or save the checkpoint again",
    unknown_architecture: "check model_type",
    wrong_type_in_config: "check model_type",
    no_classifier_architecture: "train the reward model on a decoder or an encoder",
    encoder_decoder: "train the reward model on a decoder or an encoder",
    remote_code: "remove auto_map",
    remote_tokenizer_code: "remove auto_map",
    quantized: "serve the unquantized model",
    no_weights: "put model.safetensors",
    pickled_weights: "save them as safetensors",
    missing_shard: "copy or download the checkpoint again",
    broken_index: "copy or save the checkpoint again",
    truncated_weights: "copy or download it again",
    pointer_instead_of_weights: "copy or download it again",
    causal_lm: "train one with `reward-train`",
    bare_model: "save the classifier that was trained",
    trl_value_head: "as TRL stores it .* run `reward-convert",
    openrlhf_value_head: "as OpenRLHF stores it .* run `reward-convert",
    separate_value_head: "as LLaMA-Factory stores it .* run `reward-convert",
    pickled_value_head: "run `reward-convert --allow-pickle",
    missing_layer: "save or copy the whole model again",
    three_labels: r"3 numbers per text.*model\.class_reward.*model\.outputs",
    default_label_count: "set num_labels to 1",
    other_vocabulary: "take both from the same model",
    head_of_another_model: "score.weight is stored as .* take both from the same model",
    nan_weight: "model.norm.weight.* serve an earlier checkpoint",
    infinite_weight: "score.weight.* serve an earlier checkpoint",
    no_tokenizer: "put tokenizer.json",
    slow_tokenizer: "write the fast one",
    broken_tokenizer: "save it again with save_pretrained",
    larger_tokenizer: "use the tokenizer it was trained with",
    no_pad_token: "set pad_token_id",
    pad_token_outside: "set it to the id of the pad token",
    no_limit: "set model.max_input_tokens",
}


@pytest.mark.parametrize(("damage", "remedy"), REMEDIES.items(), ids=[damage.__name__ for damage in REMEDIES])
def test_an_invalid_checkpoint_is_refused_with_a_remedy(
    damage: Callable[[Path], None], remedy: str, tmp_path: Path
) -> None:
    """Each kind of damage ends the start with one sentence that names the folder and the remedy."""
    write_tiny_checkpoint(tmp_path, max_position_embeddings=MAX_POSITIONS)
    damage(tmp_path)

    with pytest.raises(CheckpointError, match=remedy) as refusal:
        opened(tmp_path)

    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_pad_token_of_the_tokenizer_is_the_fallback(tmp_path: Path) -> None:
    """Without a pad token in the config the tokenizer's is used, and the config of the record has it."""
    write_tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.pop("pad_token_id"))

    checkpoint = opened(tmp_path)

    assert checkpoint.pad_token_id == checkpoint.config.pad_token_id == checkpoint.tokenizer.pad_token_id


def test_unusual_padding_is_noted(tmp_path: Path) -> None:
    """Different pad tokens in config and tokenizer, and a pad token that is EOS, are reported but not refused."""
    different = write_tiny_checkpoint(tmp_path / "a", pad_token_id=5)
    pad_is_eos = write_tiny_checkpoint(tmp_path / "b", pad_is_eos=True)

    assert "pooling follows config.json" in opened(different).notes[0]
    assert opened(different).pad_token_id == 5
    assert "skips EOS" in opened(pad_is_eos).notes[0]


def test_a_template_that_contains_the_date_is_noted(tmp_path: Path) -> None:
    """Such a template changes rewards from day to day, so it is reported at the start."""
    write_tiny_checkpoint(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)

    assert any("today's date" in note for note in opened(tmp_path).notes)


@pytest.mark.parametrize(
    ("model", "tokenizer", "setting", "limit"),
    [(512, 300, None, 300), (300, 512, None, 300), (512, 10**30, None, 512), (512, 300, 400, 400), (512, 512, 7, 7)],
    ids=["tokenizers", "models", "tokenizer-has-none", "setting-over-tokenizer", "setting-lower"],
)
def test_the_token_limit(model: int, tokenizer: int, setting: int | None, limit: int, tmp_path: Path) -> None:
    """It is the smaller one of model and tokenizer, or the setting, which may not exceed the model's."""
    write_tiny_checkpoint(tmp_path, max_position_embeddings=model)
    edit_json(tmp_path / "tokenizer_config.json", lambda config: config.update(model_max_length=tokenizer))

    assert opened(tmp_path, max_input_tokens=setting).max_input_tokens == limit


def test_a_limit_beyond_the_model_is_refused(tmp_path: Path) -> None:
    """A setting cannot exceed the model's positions."""
    write_tiny_checkpoint(tmp_path)

    with pytest.raises(CheckpointError, match="lower the setting"):
        opened(tmp_path, max_input_tokens=MAX_POSITIONS + 1)


def version_of(checkpoint: Checkpoint, **changes: Any) -> str:
    arguments: dict[str, Any] = {"dtype": "float32", "template": "chat"}
    return model_version(checkpoint, **(arguments | changes)).version


def test_the_version_depends_on_the_content_only(tmp_path: Path) -> None:
    """The same content in another folder, saved by another version of transformers, is the same model."""
    first, second = (write_tiny_checkpoint(tmp_path / name) for name in ("a", "b"))
    edit_json(second / "config.json", lambda config: config.update(transformers_version="4.57.1"))

    assert version_of(opened(first)) == version_of(opened(second))


def test_the_version_changes_with_everything_that_changes_rewards(tmp_path: Path) -> None:
    """Weights, config, tokenizer, templates, dtype, pooling and limit each change the version."""
    folders = [write_tiny_checkpoint(tmp_path / str(number)) for number in range(5)]
    edit_weights(folders[1], lambda weights: weights["score.weight"].mul_(2))
    edit_json(folders[2] / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    edit_json(folders[3] / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))
    (folders[4] / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    plain = opened(folders[0])

    versions = [
        *(version_of(opened(folder)) for folder in folders),
        version_of(plain, dtype="bfloat16"),
        version_of(opened(folders[0], pooling="last")),
        version_of(plain, template="concat"),
        version_of(opened(folders[0], max_input_tokens=100)),
    ]

    assert len(set(versions)) == len(versions)


def test_the_description_names_properties_and_notes(tmp_path: Path) -> None:
    """The lines for a terminal contain the properties and the notes."""
    checkpoint = opened(write_tiny_checkpoint(tmp_path, pad_is_eos=True), name="mine")

    text = "\n".join(describe(checkpoint))

    assert all(part in text for part in ("mine", "LlamaForSequenceClassification", "512", checkpoint.notes[0]))


def test_a_folder_is_located_as_it_is(tmp_path: Path) -> None:
    """A checkpoint folder is neither downloaded nor merged."""
    assert locate_checkpoint(ModelSettings(path=str(tmp_path))) == tmp_path


def test_without_a_path_it_is_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings without a path mean the demo model, which is named demo."""
    write_tiny_checkpoint(tmp_path)
    monkeypatch.setattr(service.checkpoints.checkpoint, "obtain_demo_model", lambda: tmp_path)
    settings = ModelSettings()

    assert open_checkpoint(locate_checkpoint(settings), settings).name == "demo"


def test_an_adapter_is_merged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PEFT adapter becomes a plain folder in the cache, and is merged again only after a change."""
    adapter = tmp_path / "my-adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    merged: list[Path] = []

    def merge(adapter_dir: Path, out_dir: Path) -> Path:
        merged.append(adapter_dir)
        return write_tiny_checkpoint(out_dir)

    monkeypatch.setattr(service.checkpoints.checkpoint, "merge_adapter", merge)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ModelSettings(path=str(adapter))

    first, again = locate_checkpoint(settings), locate_checkpoint(settings)
    (adapter / "adapter_model.safetensors").write_bytes(b"new weights")
    changed = locate_checkpoint(settings)

    assert first == again != changed
    assert merged == [adapter, adapter]
    assert open_checkpoint(first, settings).name == "my-adapter"


@pytest.mark.parametrize("path", ["/no/such/folder", "no-such-folder", "a/b/c"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path: str) -> None:
    """A mistyped path is reported without network access."""
    with pytest.raises(CheckpointError, match=r"no folder .* check the path"):
        locate_checkpoint(ModelSettings(path=path))


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub id without a reachable hub ends the start with a remedy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(CheckpointError, match="download it elsewhere and pass its folder"):
        locate_checkpoint(ModelSettings(path="someone/reward-model"))


# Each of these functions adds tensors that a checkpoint of another model, or of another class, would have.


def head_bias(weights: dict[str, torch.Tensor]) -> None:
    """A token classifier with one label has a bias in its head."""
    weights["score.bias"] = torch.tensor([3.0])


def attention_biases(weights: dict[str, torch.Tensor]) -> None:
    """The weights have attention biases, and the config says that there are none."""
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def unmerged_lora(weights: dict[str, torch.Tensor]) -> None:
    """LoRA matrices stand beside the base weights."""
    weights["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(4, 64)


def one_layer_more(weights: dict[str, torch.Tensor]) -> None:
    """The weights have one layer more than the config."""
    weights |= {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in weights.items()
        if ".layers.2." in name
    }


def query_norms(weights: dict[str, torch.Tensor]) -> None:
    """The weights have norms of another model type."""
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.full((16,), 2.0)


UNPLACED: dict[Callable[[dict[str, torch.Tensor]], None], str] = {
    head_bias: r"stores score\.bias, .*run `reward-convert",
    attention_biases: r"q_proj\.bias, .*from the same model",
    unmerged_lora: r"lora_A\.default\.weight, .*merge the LoRA matrices",
    one_layer_more: r"layers\.3\..* and 5 more tensors, .*from the same model",
    query_norms: r"q_norm\.weight, .*from the same model",
}


@pytest.mark.parametrize(("add", "refusal"), UNPLACED.items(), ids=[add.__name__ for add in UNPLACED])
def test_a_stored_tensor_without_a_place_is_refused(
    add: Callable[[dict[str, torch.Tensor]], None], refusal: str, tmp_path: Path
) -> None:
    """A tensor that may belong to the computation of a reward is never left out silently."""
    write_tiny_checkpoint(tmp_path)
    edit_weights(tmp_path, add)

    with pytest.raises(CheckpointError, match=refusal):
        opened(tmp_path)


def test_tensors_of_other_heads_and_old_buffers_are_left_out(tmp_path: Path) -> None:
    """What cannot change a reward is no reason to refuse: other heads on the body, stored frequencies and masks."""
    write_tiny_checkpoint(tmp_path)
    harmless = {
        "lm_head.weight": torch.ones(4, 64),
        "cls.predictions.bias": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8),
        "model.embeddings.position_ids": torch.arange(8)[None],
    }
    edit_weights(tmp_path, lambda weights: weights.update(harmless))

    assert opened(tmp_path).notes == ()


def test_one_of_several_chat_templates_is_chosen_by_name(tmp_path: Path) -> None:
    """Named chat templates without a default are refused with their names, and one is used by the setting."""
    folder = write_tiny_checkpoint(tmp_path / "model")
    plain = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": f"{name}{plain}"} for name in ("rag", "tool_use")]
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=templates))

    with pytest.raises(CheckpointError, match="rag, tool_use"):
        opened(folder)
    with pytest.raises(CheckpointError, match="none of that name"):
        opened(folder, chat_template="default")
    chosen = opened(folder, chat_template="rag")

    assert chosen.tokenizer.chat_template == f"rag{plain}"
    assert version_of(chosen) != version_of(opened(folder, chat_template="tool_use"))
    with pytest.raises(CheckpointError, match="no named chat templates"):
        opened(write_tiny_checkpoint(tmp_path / "other"), chat_template="rag")
