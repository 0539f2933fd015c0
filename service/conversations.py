"""Renders conversations by a model's chat template, and checks that the template prints the completion.

A chat template is a program of the checkpoint, which runs in the service's own sandbox with bounded work. Some print
nothing of a content that is a string, because they loop over its parts; some leave out a part of an assistant turn. A
completion that does not reach the model has the reward of another text, so that is found out here, by what was
rendered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from service.chat_templates.sandbox import MAX_TEMPLATE_CHARS, BoundedTemplate
from service.chat_templates.work import TemplateTooExpensive
from service.errors import CompletionNotRendered, HttpError, InvalidRequest
from service.records import Exchange, Message
from service.steps import MAX_BOUNDARY_CHARS

SAMPLE_PROMPT = "What does a reward model do?"
SAMPLE_COMPLETION = "It reads a prompt with its answer and says, as one number, how much people would like that answer."
OTHER_COMPLETION = "Nobody knows."

SENTINELS = ("0", "1")
"""Completions that show where a completion's text begins: they differ from each other in the first character."""

Variables = Mapping[str, str | float | bool | None]
"""What a chat template gets beside the conversation."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation."""

    text: str
    completion_start: int | None
    """Characters before the completion; None where it cannot be separated from the prompt."""

    is_whole: bool = True
    """Whether the whole completion was printed."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt, rendered alone."""

    open: str
    """Followed by the start of an assistant turn."""

    closed: str


class ConversationRenderer:
    """Renders conversations by the chat template of a tokenizer, which is not changed.

    ``content`` is the form of contents that the template prints. ``refusal`` says why no completion can be rendered;
    None where it can.

    Args:
        tokenizer: of transformers, with or without a chat template.
        accepts_partial: whether a completion of which a part is not printed is accepted.
    """

    def __init__(self, tokenizer: Any, *, accepts_partial: bool) -> None:
        self._tokenizer = tokenizer
        self._accepts_partial = accepts_partial
        self.content: Literal["text", "parts"] = "text"
        self.refusal: str | None = None
        self._templates: dict[bool, BoundedTemplate] = {}
        """By whether tools are given: a tokenizer may have a template of its own for them."""
        self._special_tokens = dict(tokenizer.special_tokens_map)
        if tokenizer.chat_template:
            self._compile()
        if self._templates:
            self._choose_content()

    def _compile(self) -> None:
        try:
            plain = self._tokenizer.get_chat_template(None, None)
            with_tools = self._tokenizer.get_chat_template(None, [{}])
            template = BoundedTemplate(plain)
            self._templates = {
                False: template,
                True: template if with_tools == plain else BoundedTemplate(with_tools),
            }
        except TemplateTooExpensive:
            self.refusal = f"The tokenizer's chat template has more than {MAX_TEMPLATE_CHARS:,} characters"
        except Exception as error:  # noqa: BLE001 - a template is a program, and parsing it may raise anything
            self.refusal = f"The tokenizer's chat template cannot be compiled in the sandbox ({type(error).__name__})"

    def render(
        self, exchange: Exchange, variables: Variables, prompts: dict[tuple[object, str], Any]
    ) -> Rendered | HttpError:
        """Render prompt and completion; the completion starts where TRL says, or where its text starts.

        Args:
            exchange: the prompt may be a string, which becomes a user turn.
            variables: allowed by the settings.
            prompts: prompts that were rendered with the same variables; gets this one.

        Returns:
            The text; InvalidRequest where the template rejects the messages or ignores the tools;
            CompletionNotRendered where it leaves out a part of the completion and that is not accepted.
        """
        if not self._tokenizer.chat_template:
            return InvalidRequest("The model has no chat template: the prompt must be a string without tools.")
        if self.refusal is not None:
            return InvalidRequest(self.refusal)
        prompt = (Message("user", exchange.prompt),) if isinstance(exchange.prompt, str) else exchange.prompt
        completion = _turns(exchange.completion)
        tools = json.loads(exchange.tools) if exchange.tools else None
        try:
            # The prompt rendered alone shows where the completion begins. Many items share a prompt: render it once.
            key = (exchange.prompt, exchange.tools)
            if key not in prompts:
                prompts[key] = self._render_prompt(prompt, tools, variables)
            alone = prompts[key]
            if isinstance(alone, HttpError):
                return alone
            text = self._render((*prompt, *completion), tools, variables)
            start = _common_start(text, alone)
            if start is None:
                start = self._start_of_text(text, prompt, completion, tools, variables)
        except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
            return self._rejection(prompt, completion, error)
        return self._checked(text, start, completion)

    def turn_ends(self, exchange: Exchange, variables: Variables, text: str) -> tuple[int, ...] | HttpError:
        """Return how many characters of a rendered conversation there are up to the end of each assistant turn.

        That is the conversation up to this turn, rendered alone, which the text must begin with.

        Args:
            exchange: what was rendered.
            variables: with which it was rendered.
            text: the rendered conversation.

        Returns:
            One number for each assistant turn of the completion; InvalidRequest where there are too many to find out,
            or the template renders earlier turns otherwise once others follow.
        """
        prompt = (Message("user", exchange.prompt),) if isinstance(exchange.prompt, str) else exchange.prompt
        completion = _turns(exchange.completion)
        tools = json.loads(exchange.tools) if exchange.tools else None
        last_turns = [index for index, turn in enumerate(completion) if turn.role == "assistant"]
        if len(last_turns) * len(text) > MAX_BOUNDARY_CHARS:
            return InvalidRequest(f"The conversation is too long to find the ends of {len(last_turns)} turns.")
        ends = []
        for index in last_turns:
            try:
                begin = self._render((*prompt, *completion[: index + 1]), tools, variables)
            except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
                return self._rejection(prompt, completion[: index + 1], error)
            if not text.startswith(begin):
                return InvalidRequest(
                    "The chat template renders a turn otherwise once others follow, so the ends of turns are unknown."
                )
            ends.append(len(begin))
        return tuple(ends)

    def _checked(self, text: str, start: int | None, completion: tuple[Message, ...]) -> Rendered | HttpError:
        is_whole = prints_whole(completion, text[start or 0 :])
        if is_whole or self._accepts_partial:
            return Rendered(text, start, is_whole)
        return CompletionNotRendered(
            "The chat template leaves out a part of the completion, so its reward would be that of another text "
            "(tokenization.unrendered: accept scores what is left)."
        )

    def _render_prompt(self, prompt: tuple[Message, ...], tools: Any, variables: Variables) -> _Prompt | HttpError:
        opened = self._render(prompt, tools, variables, open_ended=True)
        if tools and opened == self._render(prompt, None, variables, open_ended=True):
            return InvalidRequest("The model's chat template does not print tools: leave them out.")
        return _Prompt(opened, self._render(prompt, tools, variables))

    def _start_of_text(
        self,
        text: str,
        prompt: tuple[Message, ...],
        completion: tuple[Message, ...],
        tools: Any,
        variables: Variables,
    ) -> int | None:
        """Return where the completion's text begins in a conversation that does not begin with its prompt.

        Some templates print the turns before the last otherwise than the last. The same conversation with another
        completion is equal up to there.
        """
        first_char = completion[0].text.lstrip()[:1]
        sentinel = next(one for one in SENTINELS if one != first_char)
        other = self._render((*prompt, Message("assistant", sentinel)), tools, variables)
        start = _common_prefix_length(other, text)
        return start if other[start:].lstrip().startswith(sentinel) else None

    def _render(
        self, messages: tuple[Message, ...], tools: Any, variables: Variables, *, open_ended: bool = False
    ) -> str:
        num_chars = sum(message.num_chars for message in messages) + (len(json.dumps(tools)) if tools else 0)
        given = {
            **self._special_tokens,
            **variables,
            "messages": [as_transformers_passes(turn) for turn in self._turns_for_template(messages)],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": open_ended,
        }
        return self._templates[bool(tools)].render(given, num_messages=len(messages), num_chars=num_chars)

    def _turns_for_template(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        turns = [message.as_dict() for message in messages]
        return [_with_parts(turn) for turn in turns] if self.content == "parts" else turns

    def _rejection(self, prompt: tuple[Message, ...], completion: tuple[Message, ...], error: Exception) -> HttpError:
        if isinstance(error, TemplateTooExpensive):
            return InvalidRequest(
                "The model's chat template takes more work, or prints more text, for these messages than is allowed "
                "for a conversation of their size."
            )
        # The message of the error may quote the conversation, so only its class is reported.
        without_system = tuple(message for message in prompt if message.role != "system")
        if without_system and len(without_system) < len(prompt):
            try:
                self._render((*without_system, *completion), None, {})
            except Exception:  # noqa: BLE001, S110 - then the system turn is not the reason
                pass
            else:
                return InvalidRequest(
                    f"The model's chat template rejects the role system ({type(error).__name__}): put its text into "
                    "the first user message."
                )
        return InvalidRequest(f"The model's chat template rejects these messages ({type(error).__name__}).")

    def _choose_content(self) -> None:
        """Find the form of contents in which two samples are printed, or why there is none."""
        rendered, is_expensive = {}, False
        for form in ("text", "parts"):
            self.content = form
            try:
                rendered[form] = [self._sample(text) for text in (SAMPLE_COMPLETION, OTHER_COMPLETION)]
            except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
                is_expensive = is_expensive or isinstance(error, TemplateTooExpensive)
                continue
            samples = zip((SAMPLE_COMPLETION, OTHER_COMPLETION), rendered[form], strict=True)
            if all(prints_whole((Message("assistant", text),), printed) for text, printed in samples):
                return
        self.content = "text"
        if is_expensive:
            self.refusal = "The tokenizer's chat template takes more work, or prints more text, than two turns may need"
        elif not rendered:
            self.refusal = "The tokenizer's chat template cannot render one user turn and one assistant turn"
        elif not self._accepts_partial or len(set(rendered.get("text", ""))) < 2:
            self.refusal = "The tokenizer's chat template does not print the text of an assistant turn"

    def sample_turns(self, completion: str) -> list[dict[str, Any]]:
        """Return the sample prompt with a completion as turns in the form that the template prints."""
        return self._turns_for_template((Message("user", SAMPLE_PROMPT), Message("assistant", completion)))

    def _sample(self, completion: str) -> str:
        return self._render((Message("user", SAMPLE_PROMPT), Message("assistant", completion)), None, {})


def prints_whole(completion: tuple[Message, ...], text: str) -> bool:
    """Whether a rendered text contains everything that the turns of a completion say.

    White space does not count: templates trim contents, and put line breaks around reasoning. Of a tool call the name
    and the arguments' names and strings are looked up, as they are or as JSON.
    """
    if len(completion) == 1 and not completion[0].fields and completion[0].text.strip() in text:
        return True
    squeezed = _squeezed(text)
    return all(
        any(_squeezed(form) in squeezed for form in _forms(piece)) for turn in completion for piece in _pieces(turn)
    )


def _turns(completion: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message("assistant", completion),) if isinstance(completion, str) else completion


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return message if content is None else {**message, "content": [{"type": "text", "text": content}]}


def as_transformers_passes(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn as transformers passes it to a template: without empty fields, and with an alias of reasoning."""
    given = {name: value for name, value in turn.items() if value is not None}
    reasoning = given.get("reasoning_content")
    return given if reasoning is None else {"thinking": reasoning, **given}


def _pieces(turn: Message) -> Iterator[str]:
    yield turn.text
    fields = json.loads(turn.fields) if turn.fields else {}
    yield fields.get("reasoning_content", "")
    for call in fields.get("tool_calls", []):
        yield call["function"]["name"]
        yield from _leaves(call["function"].get("arguments"))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _forms(piece: str) -> Iterator[str]:
    yield piece
    yield json.dumps(piece, ensure_ascii=False)[1:-1]
    yield json.dumps(piece)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _common_start(text: str, prompt: _Prompt) -> int | None:
    """Return where the completion begins, by TRL's definition; None where the text does not begin with the prompt.

    That is the length of the common prefix of the whole text and the prompt rendered alone, with generation prompt.
    """
    if text.startswith(prompt.open):
        return len(prompt.open)
    return _common_prefix_length(prompt.open, text) if text.startswith(prompt.closed) else None


def _common_prefix_length(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
