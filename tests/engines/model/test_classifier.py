"""The pooled position, and a head whose weights are exactly the checkpoint's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_classifiers import load_tiny
from tiny_models import FAMILIES
from transformers import AutoModelForSequenceClassification

from service.checkpoints.configuration import read_config
from service.engines.linear.inplace_silu import gate_in_place
from service.engines.model.classifier import pooled_position, stored_dtype
from service.errors import SettingsError


@pytest.mark.parametrize(
    ("ids", "position"),
    [
        ((5, 6, 7), 2),
        ((5, 6, 0), 1),
        ((5, 6, 0, 0), 1),
        ((5, 0, 6, 0), 2),
        ((0, 0, 0), 0),
        ((0,), 0),
        ((5,), 0),
    ],
)
def test_hf_pooling_takes_the_rightmost_token_that_is_not_pad(ids: tuple[int, ...], position: int) -> None:
    """Trailing pads are skipped, inner ones are not, and a sequence of pads pools its first token."""
    assert pooled_position(ids, "hf", 0) == position


def test_last_pooling_and_models_without_pad_take_the_last_token() -> None:
    """Where the pad token has no role, the last token is pooled whatever it is."""
    assert pooled_position((5, 0, 0), "last", 0) == 2
    assert pooled_position((5, 0, 0), "hf", None) == 2


def test_no_tokens_have_no_reward() -> None:
    """An empty sequence is an error."""
    with pytest.raises(ValueError, match="without tokens"):
        pooled_position((), "hf", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_keeps_the_stored_weights(tiny_checkpoint, family: str, dtype: torch.dtype) -> None:
    """A head stored in fp32 is loaded bit for bit under a half-precision body, whose own weights are half precision."""
    folder = tiny_checkpoint(family)
    classifier = load_tiny(folder, dtype)
    stored = load_file(folder / "model.safetensors")
    body = f"{classifier.model.base_model_prefix}."
    head = {name: weight for name, weight in classifier.model.named_parameters() if not name.startswith(body)}

    assert head
    assert all(torch.equal(weight, stored[name]) for name, weight in head.items())
    assert {weight.dtype for weight in head.values()} == {torch.float32}
    assert {weight.dtype for weight in classifier.body.parameters()} == {dtype}


def test_loading_leaves_transformers_classes_as_they_were(tiny_checkpoint) -> None:
    """The head is loaded in fp32 for one call only: another load of the same class is not affected."""
    from transformers import AutoModelForSequenceClassification

    folder = tiny_checkpoint("llama")
    load_tiny(folder, torch.bfloat16)

    other = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)

    assert other.score.weight.dtype == torch.bfloat16


def test_another_pooling_is_refused_where_the_head_pools(tiny_checkpoint) -> None:
    """An encoder that pools in its own head cannot pool the last token; the error contains the remedy."""
    with pytest.raises(SettingsError, match="leave the setting out"):
        load_tiny(tiny_checkpoint("bert"), pooling="last")


def test_the_stored_dtype_is_the_configurations(tiny_checkpoint) -> None:
    """The dtype a checkpoint was saved in is read from its configuration."""
    assert stored_dtype(read_config(tiny_checkpoint("llama", dtype=torch.bfloat16))) == torch.bfloat16
    assert stored_dtype(read_config(tiny_checkpoint("llama"))) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gating_in_place_changes_no_bit(tiny_checkpoint, dtype: torch.dtype) -> None:
    """Overwriting the gate gives bit-identical rewards to the model as transformers loads it."""
    folder = tiny_checkpoint("llama")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    changed = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    gate_in_place(changed)
    ids = torch.arange(5, 45).unsqueeze(0)

    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, changed(ids).logits)
    assert any(isinstance(module, torch.nn.SiLU) and module.inplace for module in changed.modules())
