"""A conversion gives a plain checkpoint with the same rewards, or an error and no folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import write_adapter
from tiny_models import DECODER_FAMILIES, SENTENCES, write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from export.conversion_command import main
from export.convert import convert
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.files import CONVERSION_FILE
from service.errors import CheckpointError, OutputError
from service.settings import ModelSettings

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

HIDDEN_SIZE = 64
HEAD = torch.linspace(-0.3, 0.3, HIDDEN_SIZE).reshape(1, HIDDEN_SIZE)


def token_ids(folder: Path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor([tokenizer(sentence)["input_ids"]]) for sentence in SENTENCES]


@torch.no_grad()
def expected_rewards(source: Path, head: torch.Tensor = HEAD) -> torch.Tensor:
    """The head applied to the last hidden state of the body, as in training."""
    body = AutoModel.from_pretrained(source)
    return torch.stack([body(ids).last_hidden_state[0, -1] @ head[0] for ids in token_ids(source)])


@torch.no_grad()
def rewards_of(folder: Path) -> torch.Tensor:
    """The rewards of plain transformers for a converted checkpoint."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    return torch.stack([model(ids).logits[0, 0] for ids in token_ids(folder)])


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def trl_checkpoint(folder: Path, family: str = "llama", bias: float = 0.0) -> Path:
    """As TRL's AutoModelForCausalLMWithValueHead is saved: the causal language model and ``v_head``."""
    write_tiny_causal_lm(folder, family)
    head = {"v_head.summary.weight": HEAD, "v_head.summary.bias": torch.tensor([bias])}
    edit_weights(folder, lambda weights: weights.update(head))
    return folder


def wrapped_trl_checkpoint(folder: Path) -> Path:
    """As a trainer saves TRL's wrapper itself: the body's names start with ``pretrained_model``."""
    trl_checkpoint(folder)

    def wrap(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if not name.startswith("v_head")]:
            weights[f"pretrained_model.{name}"] = weights.pop(name)

    edit_weights(folder, wrap)
    return folder


def openrlhf_checkpoint(folder: Path, prefix: str = "value_head") -> Path:
    """As OpenRLHF saves a reward model: the body without ``lm_head``, the head under a prefix from the config."""
    write_tiny_causal_lm(folder)
    edit_weights(folder, lambda weights: (weights.pop("lm_head.weight"), weights.update({f"{prefix}.weight": HEAD})))
    config = json.loads((folder / "config.json").read_bytes())
    config |= {"architectures": ["RewardModel"], "value_head_prefix": prefix}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def openrlhf_score_checkpoint(folder: Path) -> Path:
    """OpenRLHF with the prefix ``score``: the classifier's name, in a config of two labels."""
    return openrlhf_checkpoint(folder, "score")


def llamafactory_checkpoint(folder: Path) -> Path:
    """As LLaMA-Factory saves a reward model: a causal language model, and the head in a separate file."""
    write_tiny_causal_lm(folder)
    save_file({"v_head.summary.weight": HEAD, "v_head.summary.bias": torch.zeros(1)}, folder / "value_head.safetensors")
    return folder


def tied_checkpoint(folder: Path) -> Path:
    """A value head on a model whose output layer is its embedding, so that ``lm_head`` is not stored."""
    write_tiny_causal_lm(folder, "qwen2", tie_word_embeddings=True)
    edit_weights(folder, lambda weights: weights.update({"v_head.summary.weight": HEAD}))
    return folder


LAYOUTS: dict[Callable[[Path], Path], str] = {
    trl_checkpoint: "TRL",
    wrapped_trl_checkpoint: "TRL",
    openrlhf_checkpoint: "OpenRLHF",
    openrlhf_score_checkpoint: "transformers",
    llamafactory_checkpoint: "LLaMA-Factory",
    tied_checkpoint: "TRL",
}


@pytest.mark.parametrize(("layout", "origin"), LAYOUTS.items(), ids=[layout.__name__ for layout in LAYOUTS])
def test_each_layout_has_the_same_rewards_after_conversion(
    layout: Callable[[Path], Path], origin: str, tmp_path: Path
) -> None:
    """Plain transformers gives the rewards of the source's head on its last hidden state."""
    source = layout(tmp_path / "source")
    plain = write_tiny_causal_lm(tmp_path / "plain", "qwen2" if layout is tied_checkpoint else "llama")

    conversion = convert(source, tmp_path / "out")

    torch.testing.assert_close(rewards_of(tmp_path / "out"), expected_rewards(plain))
    assert rewards_of(tmp_path / "out").std() > 0.1
    assert conversion.origin == origin
    assert json.loads((tmp_path / "out" / CONVERSION_FILE).read_bytes())["source"] == str(source)


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_each_family_can_be_converted(family: str, tmp_path: Path) -> None:
    """The head gets the classifier's name in every decoder family, and the result is valid."""
    source = trl_checkpoint(tmp_path / "source", family)

    convert(source, tmp_path / "out")

    torch.testing.assert_close(rewards_of(tmp_path / "out"), expected_rewards(source))


def test_a_fp32_head_is_not_rounded_to_a_bf16_body(tmp_path: Path) -> None:
    """Body and head are stored in their own dtypes."""
    source = trl_checkpoint(tmp_path / "source")
    edit_weights(
        source, lambda weights: weights.update({k: v.bfloat16() for k, v in weights.items() if "v_head" not in k})
    )

    convert(source, tmp_path / "out")

    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["score.weight"], HEAD)
    assert weights["model.norm.weight"].dtype == torch.bfloat16


def test_dropping_a_bias_needs_the_option_and_is_recorded(tmp_path: Path) -> None:
    """Without --drop-bias a bias is an error; with it the record has the dropped value."""
    source = trl_checkpoint(tmp_path / "source", bias=0.75)

    with pytest.raises(CheckpointError, match=r"bias of 0\.75.* pass --drop-bias"):
        convert(source, tmp_path / "out")
    conversion = convert(source, tmp_path / "out", drop_bias=True)

    assert conversion.dropped_bias == 0.75
    assert json.loads((tmp_path / "out" / CONVERSION_FILE).read_bytes())["dropped_bias"] == 0.75


def test_pickles_need_the_option(tmp_path: Path) -> None:
    """A pickled checkpoint is opened with --allow-pickle only, and then gives the same rewards."""
    source = trl_checkpoint(tmp_path / "source")
    expected = expected_rewards(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="--allow-pickle"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", allow_pickle=True)

    torch.testing.assert_close(rewards_of(tmp_path / "out"), expected)


def test_a_pickled_classifier_becomes_safetensors(tmp_path: Path) -> None:
    """A pickled plain classifier needs no new head, only new files."""
    source = write_tiny_checkpoint(tmp_path / "source")
    expected = rewards_of(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()

    convert(source, tmp_path / "out", allow_pickle=True)

    torch.testing.assert_close(rewards_of(tmp_path / "out"), expected)


def test_a_pickled_value_head_beside_safetensors(tmp_path: Path) -> None:
    """LLaMA-Factory's older form: the model in safetensors, the head in value_head.bin."""
    source = write_tiny_causal_lm(tmp_path / "source")
    torch.save({"v_head.summary.weight": HEAD}, source / "value_head.bin")

    conversion = convert(source, tmp_path / "out", allow_pickle=True)

    torch.testing.assert_close(rewards_of(tmp_path / "out"), expected_rewards(source))
    assert conversion.origin == "LLaMA-Factory"


class Bomb:
    """An object whose unpickling would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    """Even with --allow-pickle, a pickle of anything but tensors is refused before its code can run."""
    source = trl_checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save({"score.weight": Bomb(tmp_path / "ran")}, source / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="not a plain pickle of tensors"):
        convert(source, tmp_path / "out", allow_pickle=True)

    assert not (tmp_path / "ran").exists()


def test_a_fallback_pad_token_is_set_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a pad token EOS is used, as in TRL; notes and printed command name the pooling that matches training."""
    source = trl_checkpoint(tmp_path / "source")
    for name, missing in {"config.json": "pad_token_id", "tokenizer_config.json": "pad_token"}.items():
        content = json.loads((source / name).read_bytes()) | {missing: None}
        (source / name).write_text(json.dumps(content))

    conversion = convert(source, tmp_path / "out")

    checkpoint = open_checkpoint(tmp_path / "out", ModelSettings())
    assert checkpoint.pad_token_id == checkpoint.tokenizer.eos_token_id
    assert any("as TRL does" in note for note in conversion.notes)
    assert any("model.pooling set to last" in note for note in conversion.notes)

    assert main([str(source), str(tmp_path / "again")]) == 0
    assert capsys.readouterr().err.rstrip().endswith(f"reward-serve --model {tmp_path / 'again'} --pooling last")


def test_a_normalised_reward_is_reported(tmp_path: Path) -> None:
    """OpenRLHF may normalise rewards; the raw reward is served, and the notes name the difference."""
    source = openrlhf_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_bytes()) | {"normalize_reward": True, "mean": 0.5, "std": 2.0}
    (source / "config.json").write_text(json.dumps(config))

    assert any("(reward - 0.5) / 2.0" in note for note in convert(source, tmp_path / "out").notes)


@PEFT_WARNS
def test_a_peft_adapter_is_merged(tmp_path: Path) -> None:
    """An adapter with a scalar head and its named base become one plain checkpoint."""
    base = write_tiny_causal_lm(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)

    conversion = convert(adapter, tmp_path / "out")

    assert conversion.origin == "PEFT"
    assert open_checkpoint(tmp_path / "out", ModelSettings()).architecture == "LlamaForSequenceClassification"


@PEFT_WARNS
def test_an_adapter_with_a_separate_value_head(tmp_path: Path) -> None:
    """LLaMA-Factory's LoRA reward models: a causal-LM adapter and a value head give the rewards of both together."""
    base = write_tiny_causal_lm(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    save_file({"v_head.summary.weight": HEAD}, tmp_path / "adapter" / "value_head.safetensors")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")

    conversion = convert(tmp_path / "adapter", tmp_path / "out", base=base)

    torch.testing.assert_close(
        rewards_of(tmp_path / "out"), expected_rewards(tmp_path / "merged"), atol=1e-5, rtol=1e-5
    )
    assert conversion.origin == "LLaMA-Factory"


def plain_causal_lm(folder: Path) -> None:
    """There is no head at all."""
    write_tiny_causal_lm(folder)


def plain_checkpoint(folder: Path) -> None:
    """There is nothing to convert."""
    write_tiny_checkpoint(folder)


def empty_folder(folder: Path) -> None:
    """There is no checkpoint."""
    folder.mkdir()


def value_head_on_an_encoder(folder: Path) -> None:
    """The classifier's head has layers that a value head does not have."""
    write_tiny_checkpoint(folder, "deberta-v2")

    def replace_head(weights: dict[str, torch.Tensor]) -> None:
        for name in ("classifier.weight", "classifier.bias"):
            weights.pop(name)
        weights["v_head.summary.weight"] = HEAD

    edit_weights(folder, replace_head)


def missing_layer(folder: Path) -> None:
    """A weight of the body is missing."""
    trl_checkpoint(folder)
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def nan_head(folder: Path) -> None:
    """The head diverged, which the validation of the result finds."""
    trl_checkpoint(folder)
    edit_weights(folder, lambda weights: weights["v_head.summary.weight"].fill_(torch.nan))


def no_tokenizer(folder: Path) -> None:
    """The tokenizer was not copied."""
    trl_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


REFUSALS: dict[Callable[[Path], None], str] = {
    plain_causal_lm: "train a reward model with `reward-train`",
    plain_checkpoint: "serve it as it is",
    empty_folder: "pass the folder that holds its config.json",
    value_head_on_an_encoder: "only decoders",
    missing_layer: "save or copy the whole model",
    nan_head: "has NaN or infinity in score.weight",
    no_tokenizer: "has no tokenizer",
}


@pytest.mark.parametrize(("damage", "remedy"), REFUSALS.items(), ids=[damage.__name__ for damage in REFUSALS])
def test_a_refused_conversion_leaves_no_folder(damage: Callable[[Path], None], remedy: str, tmp_path: Path) -> None:
    """Each refusal names the remedy, and no incomplete folder remains."""
    damage(tmp_path / "source")

    with pytest.raises(CheckpointError, match=remedy):
        convert(tmp_path / "source", tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder that is not empty is not changed."""
    source = trl_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()

    with pytest.raises(OutputError, match="choose another folder"):
        convert(source, tmp_path / "out")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_the_command_reports_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 0 and the command to serve, or with 1 and one sentence."""
    source = trl_checkpoint(tmp_path / "source", bias=0.5)

    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "pass --drop-bias" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "out"), "--drop-bias"]) == 0
    report = capsys.readouterr().err
    assert f"reward-serve --model {tmp_path / 'out'}" in report
    assert "0.5 was left out" in report
