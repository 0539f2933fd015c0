"""Each layout of a published reward model is converted and served with the rewards of an independent reading.

The reading is transformers' body, loaded from the same weights, and the head written out here. Where a layout was read
stands beside its function; all weights are random.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_layouts import HIDDEN_SIZE, Tensors, random, store
from tiny_models import SENTENCES
from transformers import AutoModel, AutoTokenizer

from export.conversion_command import main
from export.convert import convert
from export.layouts import LAYOUTS
from service.checkpoints.reward_description import DESCRIPTION_FILE
from service.errors import CheckpointError
from service.records import Exchange
from service.settings import read_settings
from training.audit.scoring import CheckpointScorer, ScoredCompletion

PAIRS = [(prompt, completion) for prompt in SENTENCES[:3] for completion in SENTENCES[3:]]


def linear(weight: torch.Tensor, bias: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reading of a head of one layer."""
    return lambda state: (weight[0] * state).sum() + bias


def two_layers(
    tensors: Tensors, first: str, last: str, activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The reading of a head of two layers."""

    def read(state: torch.Tensor) -> torch.Tensor:
        inner = activation(tensors[f"{first}.weight"] @ state + tensors[f"{first}.bias"])
        return tensors[f"{last}.weight"][0] @ inner + tensors[f"{last}.bias"][0]

    return read


@dataclass(frozen=True)
class Published:
    """A tiny checkpoint of a published layout."""

    read: Callable[[torch.Tensor], torch.Tensor]
    """The reward of a last hidden state."""

    layout: str
    pooling: str = "last"

    appended: tuple[int, ...] = ()
    """Token ids after the text."""


def starling(folder: Path) -> Published:
    """The body as ``transformer`` and ``v_head`` without a bias.

    berkeley-nest/Starling-RM-7B-alpha, model card: ``GPTRewardModel`` reads the state before the first pad token.
    """
    head = {"v_head.weight": random(1, HIDDEN_SIZE)}
    store(folder, head, rename=lambda name: name.replace("model.", "transformer.", 1))
    return Published(linear(head["v_head.weight"]), "Starling")


def ultra_rm(folder: Path) -> Published:
    """``regression_head`` without a bias, read at the last attended token.

    openbmb/UltraRM-13b, model card: ``LlamaRewardModel``; openbmb/Eurus-RM-7b has the same head on Mistral.
    """
    head = {"regression_head.weight": random(1, HIDDEN_SIZE)}
    store(folder, head, architectures=["LlamaRewardModel"])
    return Published(linear(head["regression_head.weight"]), "UltraRM")


def beaver(folder: Path) -> Published:
    """``score_head`` with a bias, read at the last attended token, and a normalizer that the service leaves out.

    PKU-Alignment/beaver-7b-v1.0-reward: safe_rlhf/models/score_model.
    """
    head = {"score_head.weight": random(1, HIDDEN_SIZE), "score_head.bias": torch.tensor([0.5])}
    normalizer = {
        "normalizer.mean": torch.ones(1),
        "normalizer.var": torch.ones(1),
        "normalizer.count": torch.tensor(9),
    }
    store(
        folder,
        head | normalizer,
        architectures=["LlamaForScore"],
        do_normalize=True,
        score_type="reward",
        mean=[2.5],
        var=[4.0],
    )
    return Published(linear(head["score_head.weight"], 0.5), "Beaver")


def open_assistant(folder: Path) -> Published:
    """``out_proj`` with a bias, and ``pooling`` last in the configuration.

    OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1: ``GPTNeoXRewardModel`` of model_training/models/reward_model.py.
    """
    head = {"out_proj.weight": random(1, HIDDEN_SIZE), "out_proj.bias": torch.tensor([-0.25])}
    store(
        folder,
        head,
        family="gpt_neox",
        architectures=["GPTNeoXRewardModel"],
        model_type="gpt_neox_reward_model",
        pooling="last",
    )
    return Published(linear(head["out_proj.weight"], -0.25), "OpenAssistant")


def internlm2(folder: Path) -> Published:
    """Fused ``wqkv`` grouped by key-value head, and ``v_head`` read at a reward token that is appended to every text.

    internlm/internlm2-7b-reward: ``InternLM2ForRewardModel`` of modeling_internlm2.py.
    """
    head = {"v_head.weight": random(1, HIDDEN_SIZE)}
    store(
        folder,
        head,
        architectures=["InternLM2ForRewardModel"],
        model_type="internlm2",
        reward_token_id=3,
        auto_map={"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
    )
    weights = load_file(folder / "model.safetensors")
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
    }
    for layer in range(3):
        query, key, value = (weights.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv")
        rows = []
        for group in range(2):  # two key-value heads of 16 rows, each for two query heads
            rows += [query[32 * group : 32 * group + 32], key[16 * group :][:16], value[16 * group :][:16]]
        weights[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(rows)
    for ours, theirs in names.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return Published(linear(head["v_head.weight"]), "InternLM2", appended=(3,))


def qwen_math_rm(folder: Path) -> Published:
    """``score`` is linear, ReLU, linear, pooled as transformers does.

    Qwen/Qwen2.5-Math-RM-72B: modeling_qwen2_rm.py, as vLLM reads it (qwen2_rm.py).
    """
    head = {
        "score.0.weight": random(HIDDEN_SIZE, HIDDEN_SIZE, seed=1),
        "score.0.bias": random(HIDDEN_SIZE, seed=2),
        "score.2.weight": 3 * random(1, HIDDEN_SIZE, seed=3),
        "score.2.bias": torch.tensor([0.125]),
    }
    code = {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}
    store(folder, head, family="qwen2", architectures=["Qwen2ForRewardModel"], auto_map=code)
    return Published(two_layers(head, "score.0", "score.2"), "Qwen2ForRewardModel", "hf")


def inf_orm(folder: Path) -> Published:
    """``score`` is linear, ReLU, linear to ``num_labels``.

    infly/INF-ORM-Llama3.1-70B, model card: ``INFORMForSequenceClassification``.
    """
    head = {
        "score.0.weight": random(HIDDEN_SIZE, HIDDEN_SIZE, seed=1),
        "score.0.bias": random(HIDDEN_SIZE, seed=2),
        "score.2.weight": 3 * random(1, HIDDEN_SIZE, seed=3),
        "score.2.bias": torch.tensor([-1.0]),
    }
    store(folder, head, architectures=["INFORMForSequenceClassification"])
    return Published(two_layers(head, "score.0", "score.2"), "INF-ORM", "hf")


def grm(folder: Path) -> Published:
    """``v_head.summary`` is a sequence of linear layers of ``num_neurons`` with ReLU, and a last one.

    Ray2333/GRM-*, model cards: ``GRewardModel`` and its ``ValueHead``.
    """
    head = {
        "v_head.summary.0.weight": random(24, HIDDEN_SIZE, seed=1),
        "v_head.summary.0.bias": random(24, seed=2),
        "v_head.summary.2.weight": 3 * random(1, 24, seed=3),
        "v_head.summary.2.bias": torch.tensor([0.5]),
    }
    store(folder, head, architectures=["LlamaForCausalLM"], without_lm_head=False)
    return Published(two_layers(head, "v_head.summary.0", "v_head.summary.2"), "GRM")


def token_classifier(folder: Path) -> Published:
    """A token classifier with one label has a bias, which a sequence classifier has not.

    verl and AReaL save transformers' own AutoModelForTokenClassification.
    """
    head = {"score.weight": random(1, HIDDEN_SIZE), "score.bias": torch.tensor([3.0])}
    store(folder, head, architectures=["LlamaForTokenClassification"], num_labels=1)
    return Published(linear(head["score.weight"], 3.0), "token classifier")


def compiled(folder: Path) -> Published:
    """torch.compile under DDP puts two prefixes before all names."""
    head = {"module._orig_mod.score.weight": random(1, HIDDEN_SIZE)}
    store(folder, head, rename=lambda name: f"module._orig_mod.{name}", num_labels=1)
    return Published(linear(head["module._orig_mod.score.weight"]), "transformers", "hf")


PUBLISHED = (
    starling,
    ultra_rm,
    beaver,
    open_assistant,
    internlm2,
    qwen_math_rm,
    inf_orm,
    grm,
    token_classifier,
    compiled,
)


@torch.no_grad()
def expected_rewards(plain: Path, published: Published) -> list[float]:
    """The head on the last state of the text that the chat template renders."""
    body, tokenizer = AutoModel.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    rewards = []
    for prompt, completion in PAIRS:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *published.appended]
        rewards.append(float(published.read(body(torch.tensor([ids])).last_hidden_state[0, -1])))
    return rewards


def served_rewards(folder: Path, **model: Any) -> tuple[CheckpointScorer, list[float]]:
    scorer = CheckpointScorer(
        read_settings({"model": {"path": str(folder), "device": "cpu", "dtype": "float32"} | model})
    )
    scores = scorer.score([Exchange(*pair) for pair in PAIRS], lambda _: None)
    return scorer, [score.reward for score in scores if isinstance(score, ScoredCompletion)]


@pytest.mark.parametrize("write", PUBLISHED)
def test_a_published_layout_is_served_with_its_rewards(write: Callable[[Path], Published], tmp_path: Path) -> None:
    """A converted checkpoint gives the rewards of its own head on transformers' states, and says what it was."""
    published = write(tmp_path / "source")

    conversion = convert(tmp_path / "source", tmp_path / "out")
    _, rewards = served_rewards(tmp_path / "out")

    expected = expected_rewards(tmp_path / "plain", published)
    assert rewards == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert conversion.origin == published.layout
    description = json.loads((tmp_path / "out" / DESCRIPTION_FILE).read_bytes())
    assert (description["pooling"], description["source"]["layout"]) == (published.pooling, published.layout)
    assert description["text"].get("append_token_ids", []) == list(published.appended)


@pytest.mark.parametrize("forward", ["packed", "padded"])
def test_a_deeper_head_gives_the_same_rewards_on_each_path_and_in_any_batch(forward: str, tmp_path: Path) -> None:
    """On packed and padded batches rewards are those of the reading, whose order changes no more than rounding."""
    published = grm(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")

    scorer, rewards = served_rewards(tmp_path / "out", forward=forward)
    exchanges = [Exchange(*pair) for pair in PAIRS]
    backwards = scorer.score(exchanges[::-1], lambda _: None)[::-1]

    assert rewards == pytest.approx(expected_rewards(tmp_path / "plain", published), abs=1e-4)
    assert [score.reward for score in backwards if isinstance(score, ScoredCompletion)] == pytest.approx(
        rewards, abs=1e-6
    )


def test_the_activation_of_an_unknown_layout_is_not_guessed(tmp_path: Path) -> None:
    """A deeper head of an unknown class is refused until the activation is given, and then served with it."""
    head = {
        "score.0.weight": random(HIDDEN_SIZE, HIDDEN_SIZE, seed=1),
        "score.0.bias": random(HIDDEN_SIZE, seed=2),
        "score.2.weight": random(1, HIDDEN_SIZE, seed=3),
        "score.2.bias": torch.tensor([0.125]),
    }
    store(tmp_path / "source", head, architectures=["LlamaForRewardModel"])
    silu = torch.nn.functional.silu
    published = Published(two_layers(head, "score.0", "score.2", silu), "linear layers")

    with pytest.raises(CheckpointError, match="do not tell the activation between them: pass --activation"):
        convert(tmp_path / "source", tmp_path / "out")
    convert(tmp_path / "source", tmp_path / "out", activation="silu")

    _, rewards = served_rewards(tmp_path / "out")
    assert rewards == pytest.approx(expected_rewards(tmp_path / "plain", published), abs=1e-4)


def test_a_head_that_is_not_known_is_named(tmp_path: Path) -> None:
    """The refusal has the names of the tensors outside the body, and the command that prints what is known."""
    mixture = {"mixture.layers.0.weight": random(8, HIDDEN_SIZE), "regression_layer.weight": random(19, HIDDEN_SIZE)}
    store(tmp_path / "source", mixture)

    with pytest.raises(CheckpointError, match=r"mixture\.layers\.0\.weight, regression_layer\.weight.*--list"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_normalisation_is_told(tmp_path: Path) -> None:
    """What training did to the head's output and the service does not is a note of the conversion."""
    beaver(tmp_path / "source")

    notes = convert(tmp_path / "source", tmp_path / "out").notes

    assert any("less its mean ([2.5])" in note for note in notes)


def test_the_mean_of_states_is_refused(tmp_path: Path) -> None:
    """OpenAssistant's other pooling is not served, so it is not converted either."""
    open_assistant(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_bytes()) | {"pooling": "mean"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match="reads the mean of all states"):
        convert(tmp_path / "source", tmp_path / "out")


def test_the_layouts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """``--list`` prints each layout with the models that have it, and needs no folder."""
    with pytest.raises(SystemExit) as exit_status:
        main(["--list"])

    assert exit_status.value.code == 0
    assert "UltraRM" in capsys.readouterr().out


def test_the_documented_layouts_are_those_that_are_recognised() -> None:
    """docs/models.md has a row for each layout, with its pooling, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- layouts: begin -->")[2].partition("<!-- layouts: end -->")[0].splitlines()[3:]

    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    assert [(name, models, pooling) for name, models, _, pooling in cells] == [
        (layout.name, layout.models, layout.pooling) for layout in LAYOUTS
    ]
