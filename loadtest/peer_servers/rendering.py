"""Renders an item as the text that the model reads, by transformers' own rules.

It uses the tokenizer's chat template and shares no code with the service, so that it is an independent reference for
the service's rendering.
"""

from __future__ import annotations

from typing import Any


def render(tokenizer: Any, prompt: str, completion: str) -> str:
    """Return the rendered chat template with both messages, or the two strings joined where there is none."""
    if tokenizer.chat_template is None:
        return prompt + completion
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def adds_special_tokens(tokenizer: Any) -> bool:
    """Whether special tokens must be added to a rendered text; a chat template contains them already."""
    return tokenizer.chat_template is None
