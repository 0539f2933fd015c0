"""A chat template of a checkpoint cannot make a start or a request take long, or take much memory."""

from __future__ import annotations

import resource
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from tiny_models import tiny_tokenizer

from service.chat_templates.sandbox import MAX_TEMPLATE_CHARS, BoundedTemplate
from service.chat_templates.work import TemplateTooExpensive
from service.errors import CheckpointError, InvalidRequest
from service.records import Encoding, Exchange, Item, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

GROWING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = GROWTH %}{% endfor %}{{ ns.x }}"
"""Doubles a value sixty times."""

EXPENSIVE = {
    "nested-loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "printing-loop": "{% for a in range(99999) %}" + "printed" * 200 + "{% endfor %}",
    "large-loop-body": "{% for a in range(99999) %}" + "{% if a.b %}{% endif %}" * 2000 + "{% endfor %}",
    "block-in-set": "{% set x %}{% for a in range(99999) %}" + "printed" * 200 + "{% endfor %}{% endset %}",
    "repeated-text": "{{ 'a' * 10000000000 }}",
    "repeated-list": "{{ [[[0] * 100000] * 100000] * 100000 }}",
    "repeated-view": "{% set d = dict(a='a' * 1000000) %}{{ [d.items()] * 100000 }}",
    "doubled-by-plus": GROWING.replace("GROWTH", "ns.x + ns.x"),
    "doubled-by-tilde": GROWING.replace("GROWTH", "ns.x ~ ns.x"),
    "doubled-lists": GROWING.replace("GROWTH", "[ns.x, ns.x]"),
    "doubled-tuples": GROWING.replace("GROWTH", "(ns.x, ns.x)"),
    "doubled-mappings": GROWING.replace("GROWTH", "{'a': ns.x, 'b': ns.x}"),
    "doubled-dict-calls": GROWING.replace("GROWTH", "dict(a=ns.x, b=ns.x)"),
    "doubled-filters": GROWING.replace("GROWTH", "ns.x | replace('a', 'aa')"),
    "doubled-methods": GROWING.replace("GROWTH", "ns.x.replace('a', 'aa')"),
    "growing-power": "{{ 7 ** 64 ** 64 }}",
    "growing-integer": "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "wide-percent": "{{ '%1000000000d' % 1 }}",
    "wide-percent-argument": "{{ '%*d' % (1000000000, 1) }}",
    "wide-format": "{{ '{:>1000000000}'.format('a') }}",
    "wide-format-argument": "{{ '{:>{}}'.format('a', 1000000000) }}",
    "wide-center": "{{ 'a' | center(1000000000) }}",
    "wide-indent": "{{ ('\n' * 1000000) | indent(1000, true) }}",
    "wide-json": "{{ messages | tojson(indent=1000000000) }}",
    "negative-width": "{% for i in range(9999) %}{{ ('\n' * 999) | indent(-999) }}{% endfor %}",
    "negative-indent": "{% for i in range(9999) %}{{ range(99) | list | tojson(indent=-999) }}{% endfor %}",
    "long-separators": "{{ range(900) | list | tojson(separators=('a' * 1000000, 'b')) }}",
    "long-join": "{{ ('a' * 100000).join('a' * 100000) }}",
    "long-join-filter": "{{ ('a' * 100000) | join('a' * 100000) }}",
    "many-columns": "{{ 'abc' | slice(100000000) | list }}",
    "sum-of-lists": "{{ range(99999) | map('list') | sum(start=[]) }}",
    "long-chain": "{% for i in range(999) %}{{ range(99999) | map('string') | reject('ne', 'a') | first }}{% endfor %}",
    "long-comparison": "{% set x = 'a' * 9000000 %}{% for i in range(99999) %}{{ x == x[1:] }}{% endfor %}",
    "namespace-in-itself": "{% set a = namespace(x=1) %}{% set a.x = a %}{{ a }}",
    "growing-arguments": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f('a') }}",
    "long-join-of-generator": "{{ ('a' * 100000).join(range(99999) | map('string')) }}",
    "large-division": "{% set x = ('1' * 9000000) | int(base=2) %}{{ x // 3 }}",
    "equal-lists": ("{% set b = range(90000) | batch(2) | list %}{% for i in range(99999) %}{{ b == b }}{% endfor %}"),
    "long-cycle": "{% set c = cycler('a' * 1000000) %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
    "long-template": "a" * (MAX_TEMPLATE_CHARS + 1),
}
FORBIDDEN = {
    "unknown-cost-method": "{{ 'a'.ljust(1000000000) }}",
    "private-attribute": "{{ ''.__class__.__mro__ }}",
    "private-attribute-by-filter": "{{ (''|attr('__class__')).__mro__ }}",
    "filter-of-other-results": "{{ [1, 2] | random }}",
    "test-for-the-sandbox": "{{ 'random' is filter }}",
    "time-of-day": "{{ strftime_now('%H:%M:%S.%f') }}",
    "other-file": "{% include 'other' %}",
    "recursive-loop": "{% for x in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "deep-brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "endless-recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


def largest_memory() -> float:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def render(source: str) -> str:
    turns = [{"role": "user", "content": "a question"}]
    return BoundedTemplate(source).render({"messages": turns}, num_messages=1, num_chars=14)


def tokenization_of(template: str, **settings: Any) -> Tokenization:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = template
    return Tokenization(tokenizer, TokenizationSettings(**settings), max_input_tokens=2000, vocab_size=len(tokenizer))


@pytest.mark.parametrize("name", EXPENSIVE)
def test_a_template_without_end_ends_soon_and_takes_little_memory(name: str) -> None:
    """Whatever grows without end in a template, in number or in size, ends after bounded work and memory."""
    largest, begin = largest_memory(), time.process_time()

    with pytest.raises(TemplateTooExpensive):
        render(EXPENSIVE[name])

    assert time.process_time() - begin < 5  # a fifth of it on an idle machine
    assert largest_memory() - largest < 200e6


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_has_no_known_cost_is_not_there(name: str) -> None:
    """What leaves the sandbox, has an unknown cost, or differs between renderings, ends the rendering."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - some are errors of Jinja, some of Python
        render(FORBIDDEN[name])
    assert not isinstance(raised.value, MemoryError | AssertionError)


def test_dates_are_printed_as_by_transformers() -> None:
    """A template may print the date, in the formats of well-known models."""
    assert render("{{ strftime_now('%d %b %Y') }}") == time.strftime("%d %b %Y")
    with pytest.raises(SecurityError):
        render("{{ strftime_now('%M') }}")


@pytest.mark.parametrize("name", ["nested-loops", "repeated-text", "printing-loop", "long-template"])
def test_a_checkpoint_with_an_expensive_template_is_refused_in_one_sentence(name: str) -> None:
    """A start ends with a sentence about the template."""
    with pytest.raises(CheckpointError, match=r"chat template .*: correct it, or set tokenization.template to concat"):
        tokenization_of(EXPENSIVE[name] + CHATML)


@pytest.mark.parametrize("name", ["nested-loops", "doubled-by-plus", "printing-loop"])
def test_an_expensive_template_that_waits_for_a_word_fails_one_item(name: str) -> None:
    """A template that grows at a trigger word gives that item an error, and its neighbour a reward as before."""
    trap = "{% if 'abracadabra' in messages[-1]['content'] %}" + EXPENSIVE[name] + "{% endif %}" + CHATML
    scheme = tokenization_of(trap)

    harmless, trapped = scheme.encode(
        [Item(Exchange("a question", "an answer")), Item(Exchange("a question", "abracadabra"))], Encoding()
    )

    assert isinstance(harmless, TokenSequence)
    assert isinstance(trapped, InvalidRequest)
    assert "than is allowed for a conversation of their size" in str(trapped)
    assert "abracadabra" not in str(trapped)


def test_a_long_conversation_is_within_its_allowance() -> None:
    """A thousand turns, and a turn of a hundred thousand characters, are rendered whole."""
    scheme = tokenization_of(CHATML, truncation="prompt_left")
    turns = [{"role": role, "content": "word " * 20} for role in ("user", "assistant")] * 500
    template = BoundedTemplate(
        "{% for m in messages[::-1] %}{% set n = messages | length %}{% if m.content.startswith('x') %}{% endif %}"
        "{{ m.content.split('\n')[-1] | trim }}{% endfor %}"
    )

    assert template.render({"messages": turns}, num_messages=1000, num_chars=100_000).count("word") == 20_000
    (outcome,) = scheme.encode([Item(Exchange("word " * 20_000, "an answer"))], Encoding(truncation="prompt_left"))
    assert isinstance(outcome, TokenSequence)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c12345678", "type": "function", "function": {"name": "add", "arguments": {"a": "two", "b": 3}}}
QUESTION = {"role": "user", "content": "What is two plus three? <b>'x'</b>"}
ANSWER = {"role": "assistant", "content": "It is five.\n\nYes."}
CONVERSATIONS: list[tuple[list[dict[str, Any]], Any]] = [
    ([{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, ANSWER], None),
    ([QUESTION, {"role": "assistant", "content": "five", "reasoning_content": "two and three"}], None),
    (
        [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "5", "tool_call_id": "c12345678", "name": "add"},
            ANSWER,
        ],
        TOOLS,
    ),
]


@pytest.mark.slow
def test_templates_of_known_models_are_rendered_as_by_transformers() -> None:
    """The templates that TRL brings along give the texts, or the errors, of transformers' own sandbox."""
    from transformers.utils.chat_template_utils import render_jinja_template

    from service.conversations import as_transformers_passes

    trl = find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("TRL is not installed")
    files = sorted((Path(trl.origin).parent / "chat_templates").glob("*.jinja"))
    assert len(files) > 20
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "unk_token": "<u>"}
    for file in files:
        template = BoundedTemplate(file.read_text())
        for turns, tools in CONVERSATIONS:

            def theirs(turns: Any = turns, tools: Any = tools, file: Path = file) -> str:
                return str(render_jinja_template([turns], tools=tools, chat_template=file.read_text(), **special)[0][0])

            def ours(turns: Any = turns, tools: Any = tools, template: BoundedTemplate = template) -> str:
                passed = [as_transformers_passes(turn) for turn in turns]
                given = {**special, "messages": passed, "tools": tools, "documents": None}
                return template.render(
                    {**given, "add_generation_prompt": False}, num_messages=len(turns), num_chars=500
                )

            assert _outcome(ours) == _outcome(theirs), file.name


def _outcome(rendering: Any) -> str:
    try:
        return str(rendering())
    except Exception as error:  # noqa: BLE001 - templates raise anything
        return type(error).__name__
