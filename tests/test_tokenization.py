"""Tokenization gives the ids of training, counts prompt tokens exactly, and truncates only on request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BOS, DECODER_FAMILIES, EOS, FAMILIES_WITH_BOS, SENTENCES, tiny_tokenizer
from tokenizers import processors

from service.diagnostics.length import length_report
from service.errors import CheckpointError, CompletionNotRendered, InvalidRequest, SequenceTooLong, SettingsError
from service.records import Encoding, Exchange, Item, Message, ModelInputs, TemplatedText, TokenIds, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import SAMPLE_COMPLETION, SAMPLE_PROMPT, Tokenization

LIMIT = 200
DEFAULT = Encoding()
LLAMA = tiny_tokenizer("llama")

# Like Llama's and Gemma's it trims texts, so a prompt cannot be rendered separately from its completion.
TRIMMING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] | trim }}{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ eos_token }}[assistant] <think>{% endif %}"
)


def tokenization(tokenizer: Any, *, limit: int = LIMIT, **settings: Any) -> Tokenization:
    return Tokenization(tokenizer, TokenizationSettings(**settings), max_input_tokens=limit, vocab_size=len(tokenizer))


def encode_one(scheme: Tokenization, content: Any, encoding: Encoding = DEFAULT) -> Any:
    (outcome,) = scheme.encode([Item(content)], encoding)
    return outcome


def sequence_of(scheme: Tokenization, content: Any, encoding: Encoding = DEFAULT) -> TokenSequence:
    outcome = encode_one(scheme, content, encoding)
    assert isinstance(outcome, TokenSequence), outcome
    return outcome


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_an_exchange_has_the_ids_of_trl(family: str) -> None:
    """A conversation is tokenized exactly as by TRL's reward trainer, for each family of decoders."""
    from trl.data_utils import _tokenize

    tokenizer = tiny_tokenizer(family)
    turns = [("system", "Be brief."), ("user", "How do I boil an egg?")]
    answer = " Put it into boiling water.\n"

    encoded = sequence_of(tokenization(tokenizer), Exchange(tuple(Message(*turn) for turn in turns), answer))

    conversation = [{"role": role, "content": content} for role, content in [*turns, ("assistant", answer)]]
    assert list(encoded.token_ids) == _tokenize(tokenizer, conversation)["input_ids"]


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_joined_text_has_the_ids_of_trl(family: str) -> None:
    """With concat the joined strings are tokenized as a plain text by TRL, BOS included where there is one."""
    from trl.data_utils import _tokenize

    tokenizer = tiny_tokenizer(family)

    encoded = sequence_of(tokenization(tokenizer, template="concat"), Exchange("How do I", " boil an egg?"))

    assert list(encoded.token_ids) == _tokenize(tokenizer, "How do I boil an egg?")["input_ids"]
    assert (encoded.token_ids[0] == tokenizer.bos_token_id) == (family in FAMILIES_WITH_BOS)


def test_a_string_prompt_is_one_user_turn() -> None:
    """With a chat template a string prompt and a list of one user message are the same."""
    scheme = tokenization(tiny_tokenizer("llama"))

    as_string = sequence_of(scheme, Exchange("How?", "So."))
    as_messages = sequence_of(scheme, Exchange((Message("user", "How?"),), "So."))

    assert as_string == as_messages


def test_the_template_of_a_request() -> None:
    """The request takes precedence over the settings, these over the model's template, and that over concat."""
    with_template, without = tiny_tokenizer("llama"), tiny_tokenizer("bert")

    assert tokenization(with_template).template_for(Encoding()) == "chat"
    assert tokenization(without).template_for(Encoding()) == "concat"
    assert tokenization(with_template, template="concat").template_for(Encoding()) == "concat"
    assert tokenization(with_template, template="concat").template_for(Encoding(template="chat")) == "chat"


def test_a_template_may_trim_and_its_prompt_may_differ() -> None:
    """If the template trims, or its generation prompt is not in the whole text, the ids are those of the whole text."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = TRIMMING_TEMPLATE

    encoded = sequence_of(tokenization(tokenizer), Exchange("  How?  ", "  So.  "))

    text = f"{BOS}[user] How?{EOS}[assistant] So."
    prompt = f"{BOS}[user] How?{EOS}[assistant] "
    assert list(encoded.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encoded.token_ids[: encoded.num_prompt_tokens]) == prompt


def test_special_tokens_in_a_text_count_as_such() -> None:
    """A special token that a user writes out becomes that token, as in training."""
    tokenizer = tiny_tokenizer("qwen2")

    encoded = sequence_of(tokenization(tokenizer, template="concat"), Exchange("a<|im_end|>", "b"))

    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in encoded.token_ids


@given(prompt=st.text(max_size=40), completion=st.text(max_size=40))
def test_prompt_tokens_are_counted_exactly(prompt: str, completion: str) -> None:
    """The counted tokens end within the prompt, and the next one reaches into the completion."""
    encoded = sequence_of(tokenization(LLAMA, limit=10_000, template="concat"), Exchange(prompt, completion))

    ends = [end for _, end in LLAMA(prompt + completion, return_offsets_mapping=True)["offset_mapping"]]
    assert encoded.num_prompt_tokens is not None
    assert all(end <= len(prompt) for end in ends[: encoded.num_prompt_tokens])
    assert all(end > len(prompt) for end in ends[encoded.num_prompt_tokens :][:1])
    assert encoded.completion_chars == len(completion)


def test_a_token_of_prompt_and_completion_counts_as_completion() -> None:
    """Prompt and completion are never tokenized separately: a token that spans both counts once, as completion."""
    scheme = tokenization(tiny_tokenizer("qwen2"), template="concat")

    whole = sequence_of(scheme, Exchange("the quick br", "own fox"))
    prompt_only = sequence_of(scheme, Exchange("the quick br", ""))

    assert whole.token_ids == sequence_of(scheme, Exchange("the quick brown fox", "")).token_ids
    assert whole.num_prompt_tokens is not None
    assert prompt_only.num_prompt_tokens is not None
    assert whole.num_prompt_tokens < prompt_only.num_prompt_tokens


@pytest.mark.parametrize("add_bos", [True, False])
def test_two_bos_of_the_caller_are_reported_and_kept(add_bos: bool) -> None:
    """A text or ids that begin with two BOS keep both; one BOS, or the one that is added, is not two."""
    scheme, encoding = tokenization(LLAMA), Encoding(template="concat", add_bos=add_bos)
    doubled = sequence_of(scheme, TemplatedText(f"{BOS}{BOS}a"), encoding)
    ids = sequence_of(scheme, TokenIds(doubled.token_ids), encoding)
    single = [sequence_of(scheme, TemplatedText(text), encoding) for text in (f"{BOS}a", "a")]

    assert doubled.token_ids[:2] == (LLAMA.bos_token_id, LLAMA.bos_token_id)
    assert doubled.token_ids[2] != LLAMA.bos_token_id
    assert [sequence.double_bos for sequence in (doubled, ids, *single)] == [True, True, False, False]
    report = length_report(doubled)
    assert (report.double_bos, report.last_token_id) == (True, doubled.token_ids[-1])


def test_an_empty_completion_is_scored() -> None:
    """A completion may be empty."""
    encoded = sequence_of(tokenization(tiny_tokenizer("llama"), template="concat"), Exchange("How?", ""))

    assert encoded.num_completion_tokens == 0
    assert encoded.completion_chars == 0


def eos_adding_tokenizer(**changes: Any) -> Any:
    tokenizer = tiny_tokenizer("llama")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS)}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", pair=f"{BOS} $A {EOS} $B {EOS}", special_tokens=list(ids.items())
    )
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize("completion", [" So.", "", f" So.{EOS}"], ids=["plain", "empty", "ends-in-eos"])
def test_a_text_without_a_template_gets_the_end_token_that_the_tokenizer_adds(completion: str) -> None:
    """Without a chat template the ids are those of the tokenizer's own call, its end token included."""
    tokenizer = eos_adding_tokenizer(chat_template=None)
    scheme = tokenization(tokenizer)

    encoded = sequence_of(scheme, Exchange("How?", completion))

    assert list(encoded.token_ids) == tokenizer("How?" + completion)["input_ids"]
    assert sequence_of(scheme, TemplatedText("How?" + completion)).token_ids == encoded.token_ids
    assert encoded.num_prompt_tokens == len(tokenizer("How?")["input_ids"]) - 1
    assert scheme.rule.name == "concat, with the tokenizer's end token"
    assert scheme.rule.after == (tokenizer.eos_token_id,)


def test_the_end_token_is_left_out_on_request_and_after_a_template() -> None:
    """``special_tokens: leading`` leaves the end token out; a model with a chat template gets none after a text."""
    tokenizer = eos_adding_tokenizer(chat_template=None)
    leading = tokenization(tokenizer, special_tokens="leading")
    rendered = tokenization(eos_adding_tokenizer())

    assert list(sequence_of(leading, Exchange("How?", " So.")).token_ids) == tokenizer("How? So.")["input_ids"][:-1]
    assert sequence_of(rendered, TemplatedText("How?")).token_ids[-1] != tokenizer.eos_token_id
    assert leading.rule.name != tokenization(tokenizer).rule.name


ENCODER = ModelInputs(is_encoder=True, num_token_types=2)


def pair_tokenization(inputs: ModelInputs = ENCODER, limit: int = LIMIT, **settings: Any) -> tuple[Any, Tokenization]:
    tokenizer = tiny_tokenizer("bert")
    scheme = Tokenization(
        tokenizer, TokenizationSettings(**settings), max_input_tokens=limit, vocab_size=len(tokenizer), inputs=inputs
    )
    return tokenizer, scheme


@pytest.mark.parametrize("completion", ["Put it into water.", "", "a [SEP] b"])
def test_an_encoder_without_a_template_reads_a_pair(completion: str) -> None:
    """Ids and types of a pair are those of the tokenizer's own call, and the completion begins after the separator."""
    tokenizer, scheme = pair_tokenization()

    encoded = sequence_of(scheme, Exchange("How do I boil an egg?", completion))

    # As a batch: for an empty second text alone transformers' call returns a single text.
    own = tokenizer(["How do I boil an egg?"], [completion], return_token_type_ids=True)
    assert list(encoded.token_ids) == own["input_ids"][0]
    assert list(encoded.token_types) == own["token_type_ids"][0]
    assert encoded.num_completion_tokens == len(tokenizer(completion, add_special_tokens=False)["input_ids"]) + 1
    assert (scheme.rule.name, scheme.rule.decided_by) == ("pair, with token types", "tokenizer")


def test_equal_ids_of_other_types_have_other_rows() -> None:
    """A separator that the caller wrote makes equal ids of two pairs, whose types and hence rewards differ."""
    _, scheme = pair_tokenization()

    one = sequence_of(scheme, Exchange("a [SEP] b", "c"))
    other = sequence_of(scheme, Exchange("a", "b [SEP] c"))

    assert one.token_ids == other.token_ids
    assert one.row != other.row


def test_a_truncated_pair_keeps_its_separators_and_types() -> None:
    """``prompt_left`` of a pair is transformers' truncation of the first text, on the left."""
    tokenizer, scheme = pair_tokenization(limit=20)
    tokenizer.truncation_side = "left"

    encoded = sequence_of(scheme, Exchange(LONG_PROMPT, "Yes, of course."), Encoding(truncation="prompt_left"))

    own = tokenizer(LONG_PROMPT, "Yes, of course.", truncation="only_first", max_length=20, return_token_type_ids=True)
    assert (list(encoded.token_ids), list(encoded.token_types)) == (own["input_ids"], own["token_type_ids"])


def test_the_pair_form_can_be_chosen_or_refused() -> None:
    """A pair is joined with ``concat``, and has no types where the settings or the model say so."""
    tokenizer, joined = pair_tokenization(template="concat")
    _, untyped = pair_tokenization(token_types=False)
    _, without = pair_tokenization(ModelInputs(is_encoder=True))
    exchange = Exchange("How do I ", "boil an egg?")

    assert list(sequence_of(joined, exchange).token_ids) == tokenizer("How do I boil an egg?")["input_ids"]
    assert sequence_of(joined, exchange, Encoding(template="pair")).token_types
    assert sequence_of(untyped, exchange).token_types == sequence_of(without, exchange).token_types == ()
    with pytest.raises(SettingsError, match="no form for pairs"):
        tokenization(tiny_tokenizer("qwen2"), template="pair")
    assert isinstance(
        encode_one(tokenization(tiny_tokenizer("qwen2")), exchange, Encoding(template="pair")), InvalidRequest
    )


def test_types_without_embeddings_are_refused() -> None:
    """A tokenizer that asks for more token types than the model has is refused, as transformers would fail."""
    tokenizer = tiny_tokenizer("bert")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    inputs = ModelInputs(is_encoder=True, num_token_types=1)

    with pytest.raises(CheckpointError, match="token types"):
        Tokenization(tokenizer, TokenizationSettings(), max_input_tokens=9, vocab_size=400, inputs=inputs)


# Like those of vision models it loops over the parts of a content, and prints nothing of a string.
PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like that of DeepSeek-R1 it drops what an assistant turn has before the end of its reasoning.
REASONING_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


def templated(template: str, **settings: Any) -> tuple[Any, Tokenization]:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = template
    return tokenizer, tokenization(tokenizer, **settings)


def test_a_template_that_prints_no_strings_gets_parts() -> None:
    """A template that loops over parts of a content gets parts, as transformers' processors give it."""
    tokenizer, scheme = templated(PARTS_TEMPLATE)

    encoded = sequence_of(scheme, Exchange((Message("system", "Be brief."), Message("user", "How?")), "So."))

    turns = [("system", "Be brief."), ("user", "How?"), ("assistant", "So.")]
    conversation = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    assert list(encoded.token_ids) == tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
    assert scheme.rule.name == "chat, content as parts"
    assert encoded.num_prompt_tokens is not None


def test_a_template_that_never_prints_the_completion_is_refused() -> None:
    """A template that prints no assistant turn in either form would give every completion the same reward."""
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"

    with pytest.raises(CheckpointError, match="does not print"):
        templated(silent)
    with pytest.raises(CheckpointError, match="does not print"):
        templated(silent, unrendered="accept")


def test_a_completion_that_the_template_cuts_is_an_item_error() -> None:
    """What a template drops of a completion makes an item error, or by the settings a truncated item."""
    cut, whole = Exchange("2+2?", "<think>Clearly four.</think>4"), Exchange("2+2?", "4")
    _, refusing = templated(REASONING_TEMPLATE)
    _, accepting = templated(REASONING_TEMPLATE, unrendered="accept")

    assert isinstance(encode_one(refusing, cut), CompletionNotRendered)
    assert not sequence_of(refusing, whole).truncated
    assert sequence_of(accepting, cut).truncated
    assert sequence_of(accepting, cut).token_ids == sequence_of(accepting, whole).token_ids


def test_white_space_that_a_template_changes_is_no_cut() -> None:
    """Templates trim contents and put line breaks around reasoning; the completion still is printed as a whole."""
    _, scheme = templated(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'].replace('</think>', '\\n</think>\\n\\n') | trim }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )

    assert not sequence_of(scheme, Exchange("2+2?", "  <think>four</think>4\n")).truncated


def test_the_border_is_found_where_earlier_turns_change() -> None:
    """A template that prints the last user turn in another way has the border where completions begin to differ."""
    tokenizer, scheme = templated(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[LAST]' if loop.last else '[INST]' }}{{ m['content'] }}"
        "[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )

    encoded = sequence_of(scheme, Exchange("How?", "0So."))

    assert tokenizer.decode(encoded.token_ids[encoded.num_prompt_tokens :]) == f"0So.{EOS}"


def test_an_unknown_border_is_not_guessed() -> None:
    """Where the completion cannot be separated from the prompt, its length is unknown and nothing is dropped."""
    _, scheme = templated(
        "{{ messages | length }}{{ messages[-1]['content'] | length }}:{% for m in messages %}{{ m['content'] }}"
        "{% endfor %}",
        limit=30,
    )
    exchange = Exchange("How do I boil an egg?", "Put it into water.")

    assert sequence_of(tokenization(scheme._tokenizer), exchange).num_prompt_tokens is None
    outcome = encode_one(scheme, Exchange(LONG_PROMPT, "So."), Encoding(truncation="prompt_left"))
    assert isinstance(outcome, SequenceTooLong)


def test_a_system_turn_that_the_template_rejects_is_named() -> None:
    """A template without a system role gives an error that says so."""
    _, scheme = templated(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m['content'] }}"
        "{% endfor %}"
    )

    outcome = encode_one(scheme, Exchange((Message("system", "Be brief."), Message("user", "How?")), "So."))

    assert isinstance(outcome, InvalidRequest)
    assert "role system" in outcome.detail


def test_another_reading_than_the_tokenizers_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of samples are compared with the tokenizer's own call, so a misreading ends the start."""
    tokenizer = eos_adding_tokenizer(chat_template=None)
    monkeypatch.setattr("service.text_rule._around", lambda _encoded: ((), ()))

    with pytest.raises(CheckpointError, match="own call"):
        tokenization(tokenizer)


def test_an_encoder_gets_cls_and_sep() -> None:
    """A plain text for an encoder is put between CLS and SEP, as by transformers."""
    tokenizer = tiny_tokenizer("bert")

    encoded = sequence_of(tokenization(tokenizer), Exchange("How do I ", "boil an egg?"))

    assert list(encoded.token_ids) == tokenizer("How do I boil an egg?")["input_ids"]
    assert encoded.token_ids[-1] == tokenizer.sep_token_id


@pytest.mark.parametrize(
    ("text", "add_bos", "num_bos"),
    [
        ("How?", True, 1),
        ("How?", False, 0),
        (f"{BOS}How?", True, 1),
        (f"{BOS}How?", False, 1),
        (f"{BOS}{BOS}a", True, 2),
    ],
    ids=["added", "not-requested", "already-there", "not-removed", "two-of-the-caller"],
)
def test_bos_before_templated_text(text: str, add_bos: bool, num_bos: int) -> None:
    """BOS is added once, if requested and missing; what the caller wrote is never removed."""
    tokenizer = tiny_tokenizer("llama")

    encoded = sequence_of(tokenization(tokenizer), TemplatedText(text), Encoding(add_bos=add_bos))

    assert encoded.token_ids.count(tokenizer.bos_token_id) == num_bos
    assert encoded.num_prompt_tokens is None
    assert encoded.completion_chars is None


def test_token_ids_are_not_changed() -> None:
    """Token ids get no BOS, and the length of their prompt is unknown."""
    assert sequence_of(tokenization(tiny_tokenizer("llama")), TokenIds((7, 8, 9))) == TokenSequence((7, 8, 9))


@pytest.mark.parametrize(
    "content",
    [TokenIds(()), TokenIds((1, 400)), TokenIds((-1,)), TemplatedText(""), Exchange("", "")],
    ids=["no-ids", "id-too-large", "negative-id", "no-text", "empty-exchange"],
)
def test_an_item_without_valid_tokens_is_an_item_error(content: Any) -> None:
    """An item without tokens, or with ids outside the vocabulary, is refused, and the other items are scored."""
    scheme = tokenization(tiny_tokenizer("qwen2"), template="concat")

    refused, scored = scheme.encode([Item(content), Item(TokenIds((5,)))], Encoding())

    assert isinstance(refused, InvalidRequest)
    assert scored == TokenSequence((5,))


def test_messages_need_a_chat_template() -> None:
    """Messages are refused where the tokenizer has no chat template."""
    outcome = encode_one(tokenization(tiny_tokenizer("bert")), Exchange((Message("user", "How?"),), "So."))

    assert isinstance(outcome, InvalidRequest)


def test_an_error_of_the_template_is_reported_without_text() -> None:
    """A template that raises on an item makes an item error, without the text of its message."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception(m['content']) }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )

    outcome = encode_one(tokenization(tokenizer), Exchange((Message("system", "a secret"),), "So."))

    assert isinstance(outcome, InvalidRequest)
    assert "secret" not in outcome.detail


LONG_PROMPT = " ".join(SENTENCES)


@pytest.mark.parametrize("template", ["chat", "concat"])
def test_prompt_left_cuts_between_bos_and_completion(template: Any) -> None:
    """Truncation preserves BOS and completion, uses the whole limit, and counts what was dropped."""
    tokenizer = tiny_tokenizer("llama")
    exchange = Exchange(LONG_PROMPT, " Yes, of course.")
    whole = sequence_of(tokenization(tokenizer, limit=10_000), exchange, Encoding(template))

    cut = sequence_of(tokenization(tokenizer, limit=50), exchange, Encoding(template, truncation="prompt_left"))

    assert cut.token_ids == whole.token_ids[:1] + whole.token_ids[-49:]
    assert cut.token_ids[0] == tokenizer.bos_token_id
    assert cut.num_completion_tokens == whole.num_completion_tokens
    assert cut.num_dropped == whole.num_tokens - 50


@pytest.mark.parametrize("limit", [-1, 0, 1])
def test_the_limit_is_exact(limit: int) -> None:
    """A text with as many tokens as the limit is accepted, one token more is not."""
    tokenizer = tiny_tokenizer("llama")
    exchange = Exchange("How do I boil an egg?", "Put it into water.")
    num_tokens = sequence_of(tokenization(tokenizer), exchange).num_tokens

    outcome = encode_one(tokenization(tokenizer, limit=num_tokens + limit), exchange)

    assert isinstance(outcome, SequenceTooLong if limit < 0 else TokenSequence)


@pytest.mark.parametrize(
    ("content", "truncation"),
    [
        (Exchange(LONG_PROMPT, "Yes."), "error"),
        (Exchange("How?", LONG_PROMPT), "prompt_left"),
        (TemplatedText(LONG_PROMPT), "error"),
        (TokenIds((5,) * 300), "prompt_left"),
    ],
    ids=["not-requested", "completion-alone", "templated-not-requested", "token-ids"],
)
def test_an_item_that_may_not_be_truncated_is_too_long(content: Any, truncation: Any) -> None:
    """If truncation was not requested, or would cut the completion, the item is refused with its sizes."""
    outcome = encode_one(tokenization(tiny_tokenizer("llama"), limit=50), content, Encoding(truncation=truncation))

    assert isinstance(outcome, SequenceTooLong)
    assert "the limit is 50" in outcome.detail


def test_templated_text_is_truncated_on_request() -> None:
    """A templated text, whose prompt length is unknown, is cut on request from the left, after its BOS."""
    tokenizer = tiny_tokenizer("llama")

    cut = sequence_of(tokenization(tokenizer, limit=50), TemplatedText(LONG_PROMPT), Encoding(truncation="prompt_left"))

    assert cut.num_tokens == 50
    assert cut.truncated
    assert list(cut.token_ids) == [tokenizer.bos_token_id, *tokenizer(LONG_PROMPT)["input_ids"][-49:]]


def test_estimates_are_close_and_never_zero() -> None:
    """The estimate is at least one token per item, within a factor of two for prose, and exact for ids."""
    scheme = tokenization(tiny_tokenizer("llama"), limit=10_000)
    prose = [Item(Exchange(sentence, sentence)) for sentence in SENTENCES]
    true = sum(outcome.num_tokens for outcome in scheme.encode(prose, Encoding()) if isinstance(outcome, TokenSequence))

    assert true / 2 < scheme.estimate_tokens(prose) < true * 2
    assert scheme.estimate_tokens([Item(TokenIds((1, 2, 3)))]) == 3
    assert scheme.estimate_tokens([Item(TemplatedText("")), Item(TokenIds(()))]) >= 2
    assert scheme.estimate_tokens([]) == 0


def test_order_is_preserved_in_mixed_requests() -> None:
    """Outcomes are in the order of the items for any mix of kinds, and equal those of the items alone."""
    scheme = tokenization(tiny_tokenizer("llama"), limit=60)
    contents = [Exchange("How?", sentence) for sentence in SENTENCES]
    mixed = [
        Item(content) for pair in zip(contents, [TokenIds((n,)) for n in range(9, 15)], strict=True) for content in pair
    ]

    outcomes = scheme.encode([*mixed, Item(TemplatedText("end")), Item(TokenIds(()))], Encoding())

    alone = [encode_one(scheme, item.content) for item in mixed]
    assert [str(outcome) for outcome in outcomes[:-2]] == [str(outcome) for outcome in alone]
    assert scheme.encode([], Encoding()) == []


def test_threads_may_share_one_instance() -> None:
    """Many threads encode at once with the results of one, also while transformers pads with the same tokenizer."""
    tokenizer = tiny_tokenizer("llama")
    scheme = tokenization(tokenizer)
    items = [Item(Exchange("How?", sentence)) for sentence in SENTENCES]
    expected = scheme.encode(items, Encoding())

    def encode_and_pad(_: int) -> Any:
        return scheme.encode(items, Encoding())

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(encode_and_pad, range(40)))
        tokenizer(list(SENTENCES), padding="max_length", truncation=True, max_length=8)

    assert all(outcome == expected for outcome in [*outcomes, scheme.encode(items, Encoding())])


def test_the_sample_has_the_ids_of_the_chat_template() -> None:
    """The sample ids are those of the fixed exchange rendered by the model's template."""
    tokenizer = tiny_tokenizer("llama")
    conversation = [{"role": "user", "content": SAMPLE_PROMPT}, {"role": "assistant", "content": SAMPLE_COMPLETION}]

    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]

    assert list(tokenization(tokenizer, limit=4).sample_token_ids) == ids


def test_an_unusable_default_template_ends_the_start() -> None:
    """A chat template that is configured but missing, or that raises, is reported before the first request."""
    broken = tiny_tokenizer("llama")
    broken.chat_template = "{{ raise_exception('never') }}"

    with pytest.raises(SettingsError, match="set concat"):
        tokenization(tiny_tokenizer("bert"), template="chat")
    with pytest.raises(CheckpointError, match=r"set tokenization\.template to concat"):
        tokenization(broken)
