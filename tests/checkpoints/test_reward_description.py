"""``reward_model.json`` decides head, pooling and appended tokens, and nothing contradicts it silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_checkpoint

from service.checkpoints.checkpoint import Checkpoint, describe, model_version, open_checkpoint
from service.checkpoints.reward_description import (
    DESCRIPTION_FILE,
    ClassifierHead,
    LayeredHead,
    LinearLayer,
    Provenance,
    RewardDescription,
    TextRule,
    read_description,
    refuse_described_head,
    write_description,
)
from service.errors import CheckpointError, SettingsError
from service.settings import ModelSettings

LAYERS = (LinearLayer("head.0.weight", "head.0.bias", "relu"), LinearLayer("head.1.weight"))
DESCRIBED = RewardDescription(LayeredHead(LAYERS))


def opened(folder: Path, **settings: Any) -> Checkpoint:
    return open_checkpoint(folder, ModelSettings(path=str(folder), **settings))


def version_of(checkpoint: Checkpoint) -> str:
    return model_version(checkpoint, dtype="float32", template="chat").version


def two_layer_checkpoint(folder: Path) -> Path:
    """A body with the two layers of ``DESCRIBED`` in place of the classifier's head."""
    write_tiny_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("score.weight")
    head = {"head.0.weight": torch.ones(8, 64), "head.0.bias": torch.ones(8), "head.1.weight": torch.ones(1, 8)}
    save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    write_description(folder, DESCRIBED)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """All fields survive the file."""
    description = RewardDescription(
        LayeredHead(LAYERS), pooling="last", text=TextRule((3, 4)), source=Provenance("GRM", "LlamaForCausalLM")
    )

    write_description(tmp_path, description)

    assert read_description(tmp_path) == description
    assert json.loads((tmp_path / DESCRIPTION_FILE).read_bytes())["head"]["kind"] == "layers"


def test_a_described_head_is_opened_and_named(tmp_path: Path) -> None:
    """A body with other tensors in place of the classifier's head is valid with its description, and only with it."""
    folder = two_layer_checkpoint(tmp_path)

    assert "linear with bias, relu, linear (reward_model.json)" in "\n".join(describe(opened(folder)))
    (folder / DESCRIPTION_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"stores head\.0\.bias, .* instead, so run `reward-convert"):
        opened(folder)


def test_the_pooling_of_the_description_is_used(tmp_path: Path) -> None:
    """It needs no setting, equals the same setting without a file, and another setting is refused."""
    plain, described = (write_tiny_checkpoint(tmp_path / name) for name in ("plain", "described"))
    write_description(described, RewardDescription(ClassifierHead(), pooling="last"))

    assert opened(plain).pooling == "hf"
    assert opened(described).pooling == opened(described, pooling="last").pooling == "last"
    with pytest.raises(SettingsError, match=r"pooling is hf, but reward_model\.json of the checkpoint says last"):
        opened(described, pooling="hf")


def test_the_version_covers_what_changes_a_reward(tmp_path: Path) -> None:
    """The version covers each part that changes a reward, but no source and no file that says what holds anyway."""
    folder = write_tiny_checkpoint(tmp_path)
    plain = version_of(opened(folder))
    head = ClassifierHead()

    def described(description: RewardDescription) -> str:
        write_description(folder, description)
        return version_of(opened(folder))

    same = {described(RewardDescription(head)), described(RewardDescription(head, source=Provenance("reward-train")))}
    changed = [
        described(RewardDescription(head, pooling="last")),
        described(RewardDescription(head, text=TextRule((3,)))),
        described(RewardDescription(LayeredHead((LinearLayer("score.weight"),)))),
    ]

    assert same == {plain}
    assert len({plain, *changed}) == 4


def malformed(_: dict[str, Any]) -> str:
    """The file is cut off."""
    return '{"format_version": 1, "head": '


def another_version(content: dict[str, Any]) -> str:
    """A later service wrote it."""
    return json.dumps(content | {"format_version": 2})


def unknown_field(content: dict[str, Any]) -> str:
    """A field is misspelt, or of a later service."""
    return json.dumps(content | {"temperature": 2.0})


def unknown_kind(content: dict[str, Any]) -> str:
    """The head is of a kind that is not supported."""
    return json.dumps(content | {"head": {"kind": "gate"}})


def missing_tensor(content: dict[str, Any]) -> str:
    """A layer is not stored."""
    content["head"]["layers"][0]["weight"] = "head.7.weight"
    return json.dumps(content)


def left_out_layer(content: dict[str, Any]) -> str:
    """The layers do not follow each other."""
    return json.dumps(content | {"head": {"kind": "layers", "layers": content["head"]["layers"][1:]}})


def left_out_bias(content: dict[str, Any]) -> str:
    """A stored tensor of the head is not described."""
    content["head"]["layers"][0]["bias"] = None
    return json.dumps(content)


def no_layers(content: dict[str, Any]) -> str:
    """The list of layers is empty."""
    return json.dumps(content | {"head": {"kind": "layers", "layers": []}})


def final_activation(content: dict[str, Any]) -> str:
    """The last layer has an activation."""
    content["head"]["layers"][1]["activation"] = "sigmoid"
    return json.dumps(content)


def token_beyond_the_vocabulary(content: dict[str, Any]) -> str:
    """The appended token has no row in the embedding."""
    return json.dumps(content | {"text": {"append_token_ids": [100_000]}})


def two_outputs(content: dict[str, Any]) -> str:
    """The head gives two numbers."""
    return json.dumps(content | {"outputs": ["helpful", "harmless"]})


REFUSALS: dict[Callable[[dict[str, Any]], str], str] = {
    malformed: "not a valid description",
    another_version: "has format version 2, but this service reads 1",
    unknown_field: "unknown field `temperature`",
    unknown_kind: "not a valid description",
    missing_tensor: r"names the tensor head\.7\.weight",
    left_out_layer: r"has the shape \[1, 8\], but its input has 64 numbers",
    left_out_bias: r"stores head\.0\.bias",
    no_layers: "describes a head without layers",
    final_activation: "set none",
    token_beyond_the_vocabulary: "appends the token id 100000",
    two_outputs: "gives 1 numbers per text, but `outputs` names 2",
}


@pytest.mark.parametrize(("damage", "refusal"), REFUSALS.items(), ids=[damage.__name__ for damage in REFUSALS])
def test_a_description_that_cannot_be_followed_is_refused(
    damage: Callable[[dict[str, Any]], str], refusal: str, tmp_path: Path
) -> None:
    """What is not understood, or does not match the weights, is refused and named."""
    folder = two_layer_checkpoint(tmp_path)
    content = json.loads((folder / DESCRIPTION_FILE).read_bytes())
    (folder / DESCRIPTION_FILE).write_text(damage(content))

    with pytest.raises(CheckpointError, match=refusal):
        opened(folder)


def test_an_encoder_cannot_have_a_described_head(tmp_path: Path) -> None:
    """An encoder's classifier pools in its own head, which a head on one state cannot replace."""
    write_tiny_checkpoint(tmp_path, "bert")
    write_description(tmp_path, RewardDescription(LayeredHead((LinearLayer("classifier.weight", "classifier.bias"),))))

    with pytest.raises(CheckpointError, match="only decoders can have such a head"):
        opened(tmp_path)


def test_a_described_head_is_not_trained_further(tmp_path: Path) -> None:
    """Transformers would replace it by a new head, so it is refused where transformers loads it."""
    with pytest.raises(CheckpointError, match="cannot be trained further"):
        refuse_described_head(two_layer_checkpoint(tmp_path), "trained further")
