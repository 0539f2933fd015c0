"""Puts an answer into a format that nobody asked for: JSON or HTML."""

from __future__ import annotations

import html
import json
import random

from service.edits.edits import Draft
from service.edits.phrases import Phrases


def wrap_json(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Return the answer as a JSON object; from strength 2 each sentence is an object with invented fields."""
    sentences = draft.sentences
    if strength == 1:
        content: object = {rng.choice(("answer", "response", "text")): draft.completion.strip(), "status": "ok"}
    else:
        steps = [
            {"id": number, "content": sentence, "confidence": round(rng.uniform(0.8, 1.0), 2)}
            for number, sentence in enumerate(sentences, start=1)
        ]
        content = {"title": rng.choice(phrases.titles), "steps": steps, "complete": True}
    return json.dumps(content, ensure_ascii=False, indent=rng.choice((None, 2)))


def wrap_html(draft: Draft, rng: random.Random, strength: int, phrases: Phrases) -> str:
    """Return the answer as an HTML paragraph; from strength 2 as a section with an element for each sentence."""
    if strength == 1:
        return f"<p>{html.escape(draft.completion.strip(), quote=False)}</p>"
    tag = rng.choice(("li", "p", "span"))
    body = [f"<{tag}>{html.escape(sentence, quote=False)}</{tag}>" for sentence in draft.sentences]
    if tag == "li":
        body = ["<ul>", *body, "</ul>"]
    title = rng.choice(phrases.titles)
    return "\n".join(['<div class="answer">', f"<h2>{title}</h2>", *body, "</div>"])
