"""Rewards from the logits of single tokens of a causal language model: log-odds of two, or the logit of one.

Only the rows of these tokens are kept of the language model's head, so that nothing is generated and no other logit is
computed. Some architectures scale or cap logits; that is measured on transformers' own class, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from export.converted_head import HEAD, ConvertedHead
from export.stored_model import StoredModel
from service.checkpoints.described_heads import LayeredHead, LinearLayer
from service.checkpoints.reward_description import Combination, Probability, WeightedSum
from service.checkpoints.validation import DECODER_HEAD
from service.errors import CheckpointError
from service.transformers_logging import transformers_silenced

ID_PREFIX = "id:"
"""What a token begins with that is given by its id."""


@dataclass(frozen=True, slots=True)
class TokenLogits:
    """What the user asks for."""

    function: Literal["log_odds", "probability", "logit"]
    """``log_odds`` of two tokens is the difference of their logits; ``probability`` of the first one, among the two;
    ``logit`` of one token."""

    tokens: tuple[str, ...]
    """Each a text that is one token, or ``id:`` and a number. The first one is the good one."""


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a language model does to the product of a state and a row of its head."""

    scale: float = 1.0
    softcap: float | None = None


def token_logits_head(stored: StoredModel, requested: TokenLogits) -> ConvertedHead:
    """Return the head that reads these logits.

    Raises:
        CheckpointError: a text is not one token, the source has no head of a language model, or its class changes
            logits in a way that a described head cannot.
    """
    ids = [token_id(stored, token) for token in requested.tokens]
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{' and '.join(requested.tokens)} are the same token: name two different ones.")
    if stored.fit().head != (DECODER_HEAD,):
        raise CheckpointError(f"{stored.source} is an encoder, which has no logits of a next token: take a decoder.")
    rule, name = language_model_head(stored.config)
    weight = _head_weight(stored, name)
    bias = stored.tensors.get(f"{name.removesuffix('weight')}bias")
    if max(ids) >= len(weight):
        raise CheckpointError(f"The token id {max(ids)} is beyond the {len(weight):,} rows of {name}.")
    rows = torch.stack([weight[index].float() for index in ids]) * rule.scale
    tensors = {f"{HEAD}.0.weight": rows}
    if bias is not None:
        tensors[f"{HEAD}.0.bias"] = torch.stack([bias[index].float() for index in ids]) * rule.scale
    layer = LinearLayer(f"{HEAD}.0.weight", None if bias is None else f"{HEAD}.0.bias")
    return ConvertedHead(
        layout="token logits",
        head=LayeredHead((layer,), softcap=rule.softcap),
        tensors=tensors,
        sources=(name,),
        outputs=requested.tokens if len(ids) > 1 else ("reward",),
        combine=_combination(requested),
        notes=(f"The reward is the {requested.function} of the tokens with the ids {', '.join(map(str, ids))}.",),
    )


def _combination(requested: TokenLogits) -> Combination | None:
    match requested.function:
        case "log_odds":
            good, bad = requested.tokens
            return WeightedSum({good: 1.0, bad: -1.0})
        case "probability":
            return Probability(requested.tokens[0])
        case "logit":
            return None


def token_id(stored: StoredModel, token: str) -> int:
    """Return the id of a token that is given as its text, or as ``id:`` and a number.

    Raises:
        CheckpointError: the text is not one token of the source's tokenizer.
    """
    number = token.removeprefix(ID_PREFIX)
    if token.startswith(ID_PREFIX) and number.isdecimal():
        return int(number)
    tokenizer = stored.tokenizer()
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise CheckpointError(
            f"{token!r} is {len(ids)} tokens of the tokenizer of {stored.source}: name one token, or its id as "
            f"{ID_PREFIX}NUMBER."
        )
    return int(ids[0])


def _head_weight(stored: StoredModel, name: str) -> Any:
    """Return the weight of the language model's head, which may be tied to the embedding."""
    if name in stored.tensors:
        return stored.tensors[name]
    embedding = stored.fit().embedding
    if getattr(stored.config, "tie_word_embeddings", False) and embedding in stored.tensors:
        return stored.tensors[embedding]
    raise CheckpointError(
        f"{stored.source} has no language model head ({name} is absent, and the configuration does not tie it to the "
        "embedding): pass a causal language model."
    )


class _Reached(nn.Module):
    """Stands in for the head of a language model: records what it is given, and returns chosen logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.received: torch.Tensor | None = None
        self.weight = logits  # some classes read its dtype
        self.bias = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.received = states
        return self.logits.expand(*states.shape[:-1], -1)


class _Body(nn.Module):
    """Stands in for the body: returns chosen states, and has the constants of the body that it replaces."""

    def __init__(self, states: torch.Tensor, replaced: nn.Module) -> None:
        super().__init__()
        self.states = states
        self._replaced = [replaced]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return _BodyOutput(self.states)


class _BodyOutput:
    """What a body returns: states, and nothing else."""

    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor:
        if index:
            raise IndexError(index)
        return self.last_hidden_state


def language_model_head(config: Any) -> tuple[LogitRule, str]:
    """Return what transformers' class does to logits, and the name of its head's weight.

    The class is built without weights, and its body and head are replaced by stand-ins, so that its own code shows how
    the head's input and output are changed.

    Raises:
        CheckpointError: there is no such class, or it does what a described head cannot.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"transformers has no language model of the type {config.model_type}.")
    with transformers_silenced(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    name = next((f"{path}.weight" for path, module in model.named_modules() if module is head), "")
    grid = torch.tensor([-90.0, -20.0, -3.0, -0.5, 0.0, 0.25, 1.0, 8.0, 40.0])
    states = torch.linspace(-1, 1, config.get_text_config().hidden_size)[None, None]
    stand_in = _Reached(grid)
    refusal = CheckpointError(
        f"{type(model).__name__} changes the logits of its head in a way that cannot be served: train a classifier on "
        "this model with `reward-train`."
    )
    try:
        setattr(model, model.base_model_prefix, _Body(states, model.base_model))
        model.set_submodule(name.removesuffix(".weight"), stand_in)
        with torch.inference_mode():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits.flatten().float()
    except Exception as error:  # a model's code may raise anything
        raise refusal from error
    if stand_in.received is None or stand_in.received.is_meta or logits.shape != grid.shape:
        raise refusal
    before = _factor(states.flatten(), stand_in.received.flatten().float())
    softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    after = _factor(grid, logits)
    if before is not None and after is not None:
        return LogitRule(before * after), name
    if before is not None and softcap is not None:
        capped = softcap * torch.tanh(grid / softcap)
        if torch.allclose(capped, logits, rtol=1e-5, atol=1e-5):
            return LogitRule(before, float(softcap)), name
    raise refusal


def _factor(inputs: torch.Tensor, outputs: torch.Tensor) -> float | None:
    """Return the number that all inputs were multiplied by; None where there is none."""
    largest = int(inputs.abs().argmax())
    factor = float(outputs[largest] / inputs[largest])
    return factor if torch.allclose(inputs * factor, outputs, rtol=1e-6, atol=1e-7) else None
