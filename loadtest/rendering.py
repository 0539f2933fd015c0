"""The text that a model reads for an item, by transformers' own rules.

It follows the tokenizer's chat template and shares no code with the service, so that what is rendered here can be held
against what the service makes of the same item.
"""

from __future__ import annotations

from typing import Any


def render(tokenizer: Any, prompt: str, completion: str) -> str:
    """Return the tokenizer's chat template with both turns, or the two strings joined where it has none."""
    if tokenizer.chat_template is None:
        return prompt + completion
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def adds_special_tokens(tokenizer: Any) -> bool:
    """Whether a rendered text still lacks the tokenizer's special tokens; a chat template brings its own."""
    return tokenizer.chat_template is None
