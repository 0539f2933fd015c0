"""The options of a scoring request, shared by client and service."""

from __future__ import annotations

from typing import Literal, TypeAlias

TemplateChoice: TypeAlias = Literal["chat", "concat", "pair"]
"""How a plain-text prompt is rendered: by the model's chat template, joined with its completion, or as the tokenizer's
own pair of texts."""

Truncation: TypeAlias = Literal["error", "prompt_left"]
"""What happens to an item over the token limit: an item error, or tokens are removed from the left of its prompt."""

SpecialTokenText: TypeAlias = Literal["read", "escape"]
"""Special tokens that are written in the text of a completion: read as these tokens, as in training, or as text."""

DiagnosticsLevel: TypeAlias = Literal["none", "basic", "full"]
"""Which diagnostics are returned in addition to the reward."""
