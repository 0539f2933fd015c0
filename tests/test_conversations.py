"""Conversations of agents are rendered as by transformers, and their completions are found on token ids.

The templates are small, in the style of those of well-known families.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from service.errors import CompletionNotRendered, InvalidRequest
from service.messages import read_completion, read_message, read_tools
from service.records import Encoding, Exchange, Item, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": "two", "b": 3}}}

# Like Llama 3: headers around each role, contents trimmed, tools before the first user turn.
LLAMA3 = (
    "{{ bos_token }}{% set ns = namespace(told=false) %}{% for m in messages %}"
    "[{{ m['role'] if m['role'] != 'tool' else 'ipython' }}]\n\n"
    "{% if tools and m['role'] == 'user' and not ns.told %}{% set ns.told = true %}Functions: "
    "{{ tools | tojson }}\n{% endif %}"
    "{% if m.get('tool_calls') %}{% set f = m['tool_calls'][0]['function'] %}"
    '{"name": "{{ f[\'name\'] }}", "parameters": {{ f[\'arguments\'] | tojson }}}'
    "{% else %}{{ m['content'] | trim }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
# Like Qwen 2.5: a system turn is always there, tool calls in tags, tool results in user turns.
QWEN2 = (
    "<|im_start|>system\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}Be helpful.{% endif %}"
    "{% if tools %}\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n"
    "</tool_response><|im_end|>\n{% elif m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}{% for c in m.get('tool_calls', []) %}\n<tool_call>\n"
    '{"name": "{{ c[\'function\'][\'name\'] }}", "arguments": '
    "{{ c['function']['arguments'] | tojson }}}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen 3: reasoning of the last turns is printed, that before the last question is dropped; thinking can be off.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set content = m['content'] or '' %}{% set thought = m.get('reasoning_content') or '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}"
    "{{ content | trim }}{% for c in m.get('tool_calls', []) %}\n<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# Like Mistral: no system role, tools before the last user turn only if it is the last message.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m.get('tool_calls') %}[CALLS]{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}"
    "{% endfor %}{{ eos_token }}"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'tool' %}[RESULT]{{ m['content'] }}[/RESULT]"
    "{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}"
)
# Like Gemma 3: the assistant is the model, and a system text stands in front of the first user turn.
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<|im_start|>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}"
    "{{ m['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL, "gemma3": GEMMA3}

QUESTION = [{"role": "user", "content": "What is two plus three?"}]
ANSWER = [{"role": "assistant", "content": "It is five."}]
TRAJECTORY: list[dict[str, Any]] = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"},
    *ANSWER,
]


def model_of(template: str, **settings: Any) -> tuple[Any, Tokenization]:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = template
    chosen = TokenizationSettings(**settings)
    return tokenizer, Tokenization(tokenizer, chosen, max_input_tokens=2000, vocab_size=len(tokenizer))


def exchange(prompt: list[dict[str, Any]], completion: list[dict[str, Any]], tools: Any = None) -> Exchange:
    turns = tuple(read_message(turn) for turn in prompt)
    return Exchange(turns, read_completion([read_message(turn) for turn in completion]), read_tools(tools))


def encode(scheme: Tokenization, content: Exchange, **encoding: Any) -> Any:
    (outcome,) = scheme.encode([Item(content)], Encoding(**encoding))
    return outcome


def own_ids(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)["input_ids"]
    return ids


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize(
    ("completion", "tools"), [(ANSWER, None), (TRAJECTORY, None), (TRAJECTORY, TOOLS)], ids=["answer", "calls", "tools"]
)
def test_a_conversation_has_the_ids_of_transformers_and_an_exact_border(
    family: str, completion: list[dict[str, Any]], tools: Any
) -> None:
    """Ids are those of transformers' own call, and the completion's are all that the assistant wrote and no more."""
    if family == "gemma3" and completion is TRAJECTORY:
        pytest.skip("the template prints no tool calls")
    if family == "qwen3" and tools:
        pytest.skip("the template prints no tools")
    tokenizer, scheme = model_of(TEMPLATES[family])
    prompt = QUESTION if family == "mistral" else [{"role": "system", "content": "Be brief."}, *QUESTION]

    encoded = encode(scheme, exchange(prompt, completion, tools))

    assert isinstance(encoded, TokenSequence), encoded
    assert list(encoded.token_ids) == own_ids(tokenizer, [*prompt, *completion], tools=tools)
    before = tokenizer.decode(encoded.token_ids[: encoded.num_prompt_tokens])
    after = tokenizer.decode(encoded.token_ids[encoded.num_prompt_tokens :])
    assert "two plus three" in before
    assert "two plus three" not in after
    assert "five" not in before
    assert after.startswith(("It is five", " It is five", "<think>", "{", "<tool_call>", "[CALLS]"))


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_what_a_template_does_not_print_is_refused(family: str) -> None:
    """Tool calls of the completion, or tools, that the template leaves out make an item error."""
    _, scheme = model_of(TEMPLATES[family])

    if family == "gemma3":
        assert isinstance(encode(scheme, exchange(QUESTION, TRAJECTORY)), CompletionNotRendered)
    assert isinstance(encode(scheme, exchange(QUESTION, ANSWER, TOOLS)), InvalidRequest)


def test_reasoning_of_the_completion_is_kept_or_refused() -> None:
    """Reasoning is part of a completion: printed it is scored, dropped before a later question it is an error."""
    tokenizer, scheme = model_of(QWEN3)
    thinking = [{"role": "assistant", "content": "It is five.", "reasoning_content": "Two and three."}]

    inline = encode(
        scheme, exchange(QUESTION, [{"role": "assistant", "content": "<think>Two and three.</think>It is five."}])
    )
    kept = encode(scheme, exchange(QUESTION, thinking))
    dropped = encode(scheme, exchange(QUESTION, [*thinking, *QUESTION, *ANSWER]))

    assert list(kept.token_ids) == own_ids(tokenizer, [*QUESTION, *thinking])
    assert inline.token_ids == kept.token_ids
    assert tokenizer.decode(kept.token_ids[kept.num_prompt_tokens :]).startswith("<think>\nTwo")
    assert isinstance(dropped, CompletionNotRendered)


def test_template_variables_of_the_list_reach_the_template() -> None:
    """``chat_template_kwargs`` of allowed names change the rendering as in transformers; others are refused."""
    tokenizer, scheme = model_of("{{ 'off' if not enable_thinking | default(true) else 'on' }}" + QWEN2)
    content = exchange(QUESTION, ANSWER)

    encoded = encode(scheme, content, template_variables=(("enable_thinking", False),))

    assert list(encoded.token_ids) == own_ids(tokenizer, [*QUESTION, *ANSWER], enable_thinking=False)
    assert encoded.token_ids != encode(scheme, content).token_ids
    assert isinstance(encode(scheme, content, template_variables=(("add_generation_prompt", True),)), InvalidRequest)
    _, strict = model_of(QWEN2, chat_template_kwargs=())
    assert isinstance(encode(strict, content, template_variables=(("enable_thinking", False),)), InvalidRequest)


def test_arguments_of_a_call_may_be_json_in_a_string() -> None:
    """Arguments as the OpenAI format has them, JSON in a string, are rendered as the object that they hold."""
    _, scheme = model_of(QWEN2)
    as_text = {**CALL, "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}

    one, other = (
        encode(scheme, exchange(QUESTION, [{"role": "assistant", "tool_calls": [call]}])) for call in (CALL, as_text)
    )

    assert one.token_ids == other.token_ids


def test_parts_of_text_are_joined() -> None:
    """A content of text parts is the text of its parts."""
    parts = [{"type": "text", "text": "What is two"}, {"type": "text", "text": " plus three?"}]

    assert read_message({"role": "user", "content": parts}) == read_message(QUESTION[0])
