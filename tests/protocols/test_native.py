"""The native wire format: decoding of bodies, errors in them, and answers."""

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_client.options import DiagnosticsLevel

from service.errors import (
    HttpError,
    InvalidRequest,
    ItemTooLong,
    MalformedBody,
    NonFiniteReward,
    SequenceTooLong,
    TooManyItems,
)
from service.protocols.native import MAX_NAME_CHARS, RequestDefaults, parse_compare_request, parse_score_request
from service.protocols.native_answers import render_comparison, render_scores, win_probabilities
from service.records import (
    Encoding,
    Exchange,
    GroupReport,
    Item,
    LengthReport,
    Message,
    ModelIdentity,
    OodReport,
    Score,
    ScoreRequest,
    StyleReport,
    TemplatedText,
    Timings,
    TokenIds,
    Usage,
)
from service.settings import LimitSettings

DEFAULTS = RequestDefaults(LimitSettings(), truncation="error", diagnostics="basic")
CANARY = "canary-7f3a"
ITEM = {"prompt": "p", "completion": "c"}


def body_of(**fields: object) -> bytes:
    return json.dumps({"items": [ITEM]} | fields).encode()


def limited(**limits: int) -> RequestDefaults:
    return RequestDefaults(LimitSettings(**limits), truncation="error", diagnostics="basic")


def violations(body: bytes) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        parse_score_request(body, DEFAULTS)
    assert CANARY not in str(caught.value)
    return [(broken.pointer, broken.code) for broken in caught.value.violations]


def test_every_form_of_an_item() -> None:
    """Text pairs, conversations, templated text and token ids each become their own type of content, in order."""
    turns = [{"role": "user", "content": "hello"}]
    items = [
        {"prompt": "p", "completion": "c", "id": "a", "group": "g"},
        {"prompt": turns, "completion": ""},
        {"text": "t"},
        {"token_ids": [0, 7]},
    ]

    request = parse_score_request(body_of(items=items), DEFAULTS)

    assert request.items == (
        Item(Exchange("p", "c"), "a", "g"),
        Item(Exchange((Message("user", "hello"),), "")),
        Item(TemplatedText("t")),
        Item(TokenIds((0, 7))),
    )


def test_defaults() -> None:
    """A request without options gets the defaults of the service."""
    defaults = RequestDefaults(LimitSettings(deadline_s=20.0), truncation="prompt_left", diagnostics="full")

    request = parse_score_request(body_of(), defaults)

    assert (request.encoding, request.diagnostics, request.timeout_s) == (Encoding(None, "prompt_left"), "full", 20.0)


def test_options_of_the_request() -> None:
    """Options of a request override the defaults; the timeout is converted to seconds."""
    request = parse_score_request(
        body_of(diagnostics="none", truncation="prompt_left", template="concat", timeout_ms=1500), DEFAULTS
    )

    assert (request.encoding, request.diagnostics, request.timeout_s) == (
        Encoding("concat", "prompt_left"),
        "none",
        1.5,
    )


def test_repeated_key_last_wins() -> None:
    """Of repeated keys in an object the last one counts."""
    request = parse_score_request(b'{"items":[],"items":[{"text":"a","text":"b"}]}', DEFAULTS)

    assert request.items == (Item(TemplatedText("b")),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"items":[]} {}',
        b'{"items":NaN}',
        b'{"timeout_ms":Infinity}',
        b'{"timeout_ms":-Infinity}',
        b'{"items":[{"text":"\xff"}]}',
        b'{"items":[{"text":"\x01"}]}',
        b'{"items":[{"text":"\\x41"}]}',
        b'\xef\xbb\xbf{"items":[]}',
        '{"items":[{"text":"a"}]}'.encode("utf-16"),
    ],
    ids=[
        "empty",
        "cut",
        "trailing",
        "nan",
        "inf",
        "neg-inf",
        "bad-utf8",
        "control",
        "escape",
        "bom",
        "utf16",
    ],
)
def test_not_json(body: bytes) -> None:
    """A body that is not JSON in UTF-8 is malformed, whatever other errors it has."""
    with pytest.raises(MalformedBody):
        parse_score_request(body, DEFAULTS)


@pytest.mark.parametrize(
    "text",
    [rb"\ud800", rb"x\uDFFFy", rb"\ud800A", rb"\\\ud83d", rb"\ud83d\ud83d\ude00"],
    ids=["high", "low", "high-then-letter", "after-backslash", "high-then-pair"],
)
def test_lone_surrogate(text: bytes) -> None:
    """A lone surrogate is JSON but not text: an invalid request, distinct from a malformed body."""
    assert violations(b'{"items":[{"text":"' + text + b'"}]}') == [("", "lone_surrogate")]


def test_surrogate_pair_and_escaped_backslash() -> None:
    """A surrogate pair is a character, and an escaped backslash before u is text."""
    request = parse_score_request(rb'{"items":[{"text":"\ud83d\ude00 \\ud800"}]}', DEFAULTS)

    assert request.items == (Item(TemplatedText("\U0001f600 \\ud800")),)


@pytest.mark.parametrize(
    ("fields", "pointer", "code"),
    [
        ({CANARY: 1}, "", "unknown_field"),
        ({"items": [ITEM | {CANARY: 1}]}, "/items/0", "unknown_field"),
        ({"items": CANARY}, "/items", "wrong_type"),
        ({"items": []}, "/items", "too_few"),
        ({"items": [ITEM, CANARY]}, "/items/1", "wrong_type"),
        ({"items": [{"prompt": 1, "completion": CANARY}]}, "/items/0/prompt", "wrong_type"),
        ({"items": [{"prompt": None, "completion": CANARY}]}, "/items/0", "not_one_form"),
        ({"items": [{"prompt": [{"role": "user"}], "completion": ""}]}, "/items/0/prompt/0/content", "missing_field"),
        ({"items": [{"prompt": [], "completion": ""}]}, "/items/0/prompt", "too_few"),
        ({"items": [{"prompt": [[[CANARY]]], "completion": ""}]}, "/items/0/prompt/0", "wrong_type"),
        ({"items": [{"prompt": CANARY}]}, "/items/0", "not_one_form"),
        ({"items": [{}]}, "/items/0", "not_one_form"),
        ({"items": [ITEM | {"text": CANARY}]}, "/items/0", "not_one_form"),
        ({"items": [{"text": CANARY, "token_ids": [1]}]}, "/items/0", "not_one_form"),
        ({"items": [{"token_ids": []}]}, "/items/0/token_ids", "too_few"),
        ({"items": [{"token_ids": [1, -1]}]}, "/items/0/token_ids/1", "out_of_range"),
        ({"items": [{"token_ids": [1.5]}]}, "/items/0/token_ids/0", "wrong_type"),
        ({"items": [{"token_ids": [2**31]}]}, "/items/0/token_ids/0", "out_of_range"),
        ({"items": [{"token_ids": [10**400]}]}, "/items/0/token_ids/0", "out_of_range"),
        ({"items": [ITEM | {"id": 7.5}]}, "/items/0/id", "wrong_type"),
        ({"items": [ITEM | {"id": True}]}, "/items/0/id", "wrong_type"),
        ({"items": [ITEM | {"id": 2**63}]}, "/items/0/id", "out_of_range"),
        ({"items": [ITEM | {"group": -(10**4000)}]}, "/items/0/group", "out_of_range"),
        ({"items": None}, "/items", "wrong_type"),
        ({"diagnostics": CANARY}, "/diagnostics", "out_of_range"),
        ({"truncation": CANARY}, "/truncation", "out_of_range"),
        ({"template": CANARY}, "/template", "out_of_range"),
        ({"timeout_ms": 0}, "/timeout_ms", "out_of_range"),
        ({"timeout_ms": 10**401}, "/timeout_ms", "out_of_range"),
        ({"timeout_ms": 10**4000}, "/timeout_ms", "out_of_range"),
        ({"timeout_ms": True}, "/timeout_ms", "wrong_type"),
        ({"timeout_ms": CANARY}, "/timeout_ms", "wrong_type"),
    ],
)
def test_wrong_request(fields: dict[str, object], pointer: str, code: str) -> None:
    """Each violation has a pointer and a stable code, and no part of the body is in the error."""
    assert violations(body_of(**fields)) == [(pointer, code)]


EXPECTATIONS: list[tuple[bytes, str]] = [
    (b'{"items":[{"response":"x"}]}', 'Unknown field "response"; did you mean "completion"? (at /items/0)'),
    (b'{"item":[]}', 'Unknown field "item"; did you mean "items"? (at the whole body)'),
    (b'{"prompt":"a"}', 'Unknown field "prompt"; it is a field of an item (at the whole body)'),
    (b'{"items":[{"timeout_ms":1}]}', 'Unknown field "timeout_ms"; it is a field of a score request (at /items/0)'),
    (
        b'{"items":[{"colour":1}]}',
        (
            'Unknown field "colour"; an item has prompt, completion, tools, text, token_ids, steps, step_token_id, id, '
            "group (at /items/0)"
        ),
    ),
    (
        b'{"items":[{"%s":1}]}' % CANARY.encode(),
        (
            "Unknown field with a name of 11 characters; "
            "an item has prompt, completion, tools, text, token_ids, steps, step_token_id, id, group (at /items/0)"
        ),
    ),
    (b"{}", 'Missing field "items": a list of items (at /items)'),
    (b'{"items":{}}', "Expected a list of items, found an object (at /items)"),
    (
        b'{"items":[{"prompt":5}]}',
        "Expected a string or a list of messages, found an integer (at /items/0/prompt)",
    ),
    (
        b'{"items":[{"token_ids":[1,1e5]}]}',
        (
            "Expected an integer from 0 to 2147483647, found a number with a fraction or an exponent "
            "(at /items/0/token_ids/1)"
        ),
    ),
    (
        b'{"items":[{"id":""}],"timeout_ms":1e400}',
        "Expected a number from 1 to 9223372036854775808 (at /timeout_ms)",
    ),
    (
        b'{"items":[],"timeout_ms":' + b"9" * 5000 + b"}",
        "Expected a number from 1 to 9223372036854775808 (at /timeout_ms)",
    ),
    (
        b'{"items":[],"chat_template_kwargs":{"%s":[]}}' % CANARY.encode(),
        (
            "Expected a string or an integer or a number or a boolean as every value, found a list "
            "(at /chat_template_kwargs)"
        ),
    ),
    (
        b'{"items":[{"prompt":"p","completion":[{"role":"assistant","contents":"x"}]}]}',
        'Unknown field "contents"; did you mean "content"? (at /items/0/completion/0)',
    ),
    (b'{"items":[{"tools":[5]}]}', "Expected an object, found an integer (at /items/0/tools/0)"),
    (b'{"items":[],"diagnostics":"all"}', 'Expected one of "basic", "full", "none" (at /diagnostics)'),
    (
        b'{"items":[{"prompt":"a"}]}',
        (
            "An item has either prompt and completion, or text, or token_ids, and nothing else; this one has prompt "
            "(at /items/0)"
        ),
    ),
]


@pytest.mark.parametrize(("body", "detail"), EXPECTATIONS, ids=range(len(EXPECTATIONS)))
def test_violations_name_the_field_and_what_is_expected(body: bytes, detail: str) -> None:
    """A detail names the field, the nearest name of the schema, the types, ranges and values that are accepted."""
    with pytest.raises(InvalidRequest) as caught:
        parse_score_request(body, DEFAULTS)

    assert caught.value.detail == detail


@pytest.mark.parametrize("field", ["secret` - at `$.secret.value", "a" * 41, "ünïcode", "two words", 'x"; injected'])
def test_names_that_are_no_short_identifier_are_not_repeated(field: str) -> None:
    """A name of an unknown field that may be text of a user is in no message and in no pointer."""
    with pytest.raises(InvalidRequest) as caught:
        parse_score_request(json.dumps({"items": [{field: 1}]}).encode(), DEFAULTS)

    assert field not in caught.value.detail
    assert "secret.value" not in caught.value.detail
    assert all("secret" not in broken.pointer for broken in caught.value.violations)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b" \n", "The body is empty; send a JSON object"),
        (b'{"items":[\n  {]}', "The body is not JSON: object keys must be strings (byte 14, line 2, column 4)"),
        (b'{"items":NaN}', "The body is not JSON, which has no NaN and no infinity (byte 9, line 1, column 10)"),
        (b'{"items":[{"text":"\xff"}]}', "The body is not UTF-8 (byte 19, line 1, column 20)"),
        (b'{"items":[{"text":"a"', "The body is not complete JSON: it ends after 21 bytes"),
        (b"\xef\xbb\xbf{}", "The body begins with a byte-order mark; send JSON in UTF-8 without one"),
    ],
    ids=["empty", "syntax", "nan", "utf-8", "cut", "byte-order-mark"],
)
def test_syntax_errors_have_a_position(body: bytes, detail: str) -> None:
    """A body that is not JSON is refused with the byte, line and column at which it breaks off."""
    with pytest.raises(MalformedBody) as caught:
        parse_score_request(body, DEFAULTS)

    assert caught.value.detail == detail


def test_null_counts_as_left_out() -> None:
    """Fields that are null are those that the request does not have, in the request and in its items."""
    items = [
        {"prompt": "p", "completion": "c", "text": None, "token_ids": None, "id": None, "group": None},
        {"prompt": None, "completion": None, "text": "t", "token_ids": None},
        {"prompt": None, "completion": None, "text": None, "token_ids": [7]},
    ]
    options = dict.fromkeys(("diagnostics", "truncation", "template", "timeout_ms"))

    request = parse_score_request(body_of(items=items, **options), DEFAULTS)

    assert request == parse_score_request(body_of(items=[ITEM, {"text": "t"}, {"token_ids": [7]}]), DEFAULTS)


def test_null_counts_as_left_out_of_a_comparison() -> None:
    """Options of a comparison that are null are the defaults."""
    options = dict.fromkeys(("diagnostics", "truncation", "template", "timeout_ms"))
    body = {"prompt": "p", "completions": ["a", "b"]}

    request = parse_compare_request(json.dumps(body | options).encode(), DEFAULTS)

    assert request == parse_compare_request(json.dumps(body).encode(), DEFAULTS)


def test_ids_may_be_numbers() -> None:
    """An integer id comes back as the integer that it was, also beyond the integers of a float."""
    items = [ITEM | {"id": number, "group": number} for number in (0, -1, 2**53 + 1, 2**63 - 1)]
    request = parse_score_request(body_of(items=items), DEFAULTS)

    answer = json.loads(render_scores(request, [Score(1.0)] * 4, MODEL, "chat", USAGE, TIMINGS))

    assert [result["id"] for result in answer["results"]] == [0, -1, 2**53 + 1, 2**63 - 1]


def test_timeout_may_be_written_as_a_float() -> None:
    """Milliseconds with a decimal point, as JavaScript and pandas write them, are the same timeout."""
    assert parse_score_request(body_of(timeout_ms=1500.0), DEFAULTS).timeout_s == 1.5


def test_missing_items() -> None:
    """The error of a request without items names the missing field."""
    assert violations(b"{}") == [("/items", "missing_field")]


def test_deep_nesting_is_refused_without_recursion() -> None:
    """A hundred thousand nested brackets are refused and do not crash the process."""
    with pytest.raises(HttpError) as caught:
        parse_score_request(b'{"items":[{"prompt":' + b"[" * 100_000, DEFAULTS)

    assert caught.value.status in {400, 422}


@pytest.mark.parametrize(("length", "fits"), [(9, True), (10, True), (11, False)])
def test_limit_of_items(length: int, fits: bool) -> None:
    """A request may have exactly as many items as the limit."""
    check_limit(fits, TooManyItems, body_of(items=[ITEM] * length), limited(max_request_items=10))


@pytest.mark.parametrize(("length", "fits"), [(9, True), (10, True), (11, False)])
@pytest.mark.parametrize("form", ["pair", "conversation", "text"])
def test_limit_of_characters(form: str, length: int, fits: bool) -> None:
    """The limit counts the characters, not bytes, of prompt, completion and roles together, in every form."""
    turns = [{"role": "u", "content": "ü" * 3}, {"role": "u", "content": ""}]
    item = {
        "pair": {"prompt": "ü" * 5, "completion": "ü" * (length - 5)},
        "conversation": {"prompt": turns, "completion": "ü" * (length - 5)},
        "text": {"text": "ü" * length},
    }[form]

    check_limit(fits, ItemTooLong, body_of(items=[item]), limited(max_item_chars=10))


@pytest.mark.parametrize(
    ("length", "fits"), [(MAX_NAME_CHARS - 1, True), (MAX_NAME_CHARS, True), (MAX_NAME_CHARS + 1, False)]
)
@pytest.mark.parametrize("name", ["id", "group"])
def test_limit_of_names(name: str, length: int, fits: bool) -> None:
    """Names that are echoed may have exactly as many characters as the limit."""
    check_limit(fits, InvalidRequest, body_of(items=[ITEM | {name: "x" * length}]), DEFAULTS)


@pytest.mark.parametrize(("timeout_ms", "timeout_s"), [(1999, 1.999), (2000, 2.0), (2001, 2.0), (10**9, 2.0)])
def test_limit_of_the_timeout(timeout_ms: int, timeout_s: float) -> None:
    """A timeout above the service's deadline is accepted and reduced to it."""
    defaults = RequestDefaults(LimitSettings(deadline_s=2.0), truncation="error", diagnostics="basic")

    assert parse_score_request(body_of(timeout_ms=timeout_ms), defaults).timeout_s == timeout_s


def check_limit(fits: bool, error: type[HttpError], body: bytes, defaults: RequestDefaults) -> None:
    if fits:
        assert parse_score_request(body, defaults).items
    else:
        with pytest.raises(error):
            parse_score_request(body, defaults)


@pytest.mark.parametrize(("count", "error"), [(1, InvalidRequest), (2, None), (5, None), (6, TooManyItems)])
def test_comparison_takes_two_or_more(count: int, error: type[HttpError] | None) -> None:
    """A comparison needs two completions, has its own limit, and has one item per completion."""
    body = json.dumps({"prompt": "p", "completions": ["c"] * count}).encode()
    if error is None:
        request = parse_compare_request(body, limited(max_compare_completions=5))
        assert request.items == (Item(Exchange("p", "c")),) * count
    else:
        with pytest.raises(error):
            parse_compare_request(body, limited(max_compare_completions=5))


@given(st.binary(max_size=200))
def test_any_bytes_give_a_request_or_an_http_error(body: bytes) -> None:
    """No body raises anything but an HttpError."""
    assert status_of(body) in {200, 400, 413, 422}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(["items", "diagnostics", "truncation", "template", "timeout_ms", "other"])


@given(st.dictionaries(FIELDS, JSON_VALUES, max_size=4))
def test_any_json_gives_a_request_or_an_http_error(fields: dict[str, object]) -> None:
    """No JSON object raises anything but an HttpError."""
    assert status_of(msgspec.json.encode(fields)) in {200, 400, 413, 422}


def status_of(body: bytes) -> int:
    try:
        parse_score_request(body, DEFAULTS)
    except HttpError as error:
        return error.status
    return 200


MODEL = ModelIdentity("tiny", "v1")
USAGE = Usage(3, 4, 7, 1)
TIMINGS = Timings(0.001, 0.002, 0.003, 0.004, 0.0105)


def request_of(*items: Item, diagnostics: DiagnosticsLevel = "basic") -> ScoreRequest:
    return ScoreRequest(items, Encoding(), diagnostics, 1.0)


def test_complete_answer() -> None:
    """The answer names the model, keeps the order, echoes ids, and has an error in place of a missing reward."""
    items = (Item(TemplatedText("a"), "first"), Item(TemplatedText("b")))
    length = LengthReport(None, None, None, 7, truncated=False)
    outcomes = (Score(1.5, length, gap="missing"), SequenceTooLong("9 tokens; the limit is 8"))

    answer = json.loads(render_scores(request_of(*items), outcomes, MODEL, "chat", USAGE, TIMINGS))

    assert answer == {
        "model": {"name": "tiny", "version": "v1"},
        "template": "chat",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "scored_tokens": 7, "shared_tokens": 1},
        "timings_ms": {"parse": 1.0, "tokenize": 2.0, "queue": 3.0, "engine": 4.0, "total": 10.5},
        "results": [
            {
                "index": 0,
                "id": "first",
                "reward": 1.5,
                "reward_z": None,
                "reward_percentile": None,
                "reward_length_adjusted": None,
                "style": None,
                "calibration": "missing",
                "length": {
                    "prompt_tokens": None,
                    "completion_tokens": None,
                    "completion_chars": None,
                    "scored_tokens": 7,
                    "truncated": False,
                    "length_z": None,
                    "length_percentile": None,
                    "last_token_id": None,
                    "double_bos": False,
                    "special_tokens": None,
                },
            },
            {
                "index": 1,
                "error": {
                    "type": "urn:reward-service:problem:sequence_too_long",
                    "title": "The item has too many tokens",
                    "detail": "9 tokens; the limit is 8",
                    "code": "sequence_too_long",
                },
            },
        ],
    }


OOD = OodReport(
    p_value=0.002,
    flag=True,
    mode="single",
    surprise=7.5,
    reason="text:emoji+",
    resolution=0.001,
    calibration_id="sha256:0",
    valid_for_tail=True,
    p_text=0.001,
)
STYLE = StyleReport(headers=1, list_items=2, bold=0, emoji=9, hedges=0, flattery=0, words=30)


@pytest.mark.parametrize(
    ("level", "members"),
    [
        ("none", set()),
        ("basic", {"reward_z", "reward_percentile", "reward_length_adjusted", "length", "style", "group"}),
        (
            "full",
            {"reward_z", "reward_percentile", "reward_length_adjusted", "length", "style", "group"}
            | {"reward_std_epistemic", "reward_disagreement", "ood"},
        ),
    ],
)
def test_members_of_each_level(level: DiagnosticsLevel, members: set[str]) -> None:
    """Members that a level does not include are absent; those that it includes have the documented names."""
    score = Score(1.5, reward_z=0.5, ood=OOD, style=STYLE, group=GroupReport(2, None, -0.5))

    answer = json.loads(
        render_scores(request_of(Item(TemplatedText("a")), diagnostics=level), (score,), MODEL, "chat", USAGE, TIMINGS)
    )

    (result,) = answer["results"]
    assert set(result) - {"index", "reward"} == members
    if level == "full":
        assert result["ood"]["p_layers"] == {"mid": None, "last": None}
        assert result["ood"]["reason"] == "text:emoji+"
        assert result["style"]["emoji"] == 9
        assert result["group"] == {"n": 2, "length_corr": None, "reward_centered": -0.5, "disagreement": None}


@pytest.mark.parametrize(("spread", "lower"), [(0.25, 1.0), (None, None)])
def test_a_lower_reward_is_beside_the_reward(spread: float | None, lower: float | None) -> None:
    """With pessimism a result has the lower reward beside the raw one, null without heads; else it has none."""
    score = Score(1.5, reward_disagreement=spread)
    requests = [
        parse_score_request(body_of(items=[{"text": "a"}], diagnostics="full", **options), DEFAULTS)
        for options in ({"pessimism": 2}, {})
    ]

    results = [
        json.loads(render_scores(request, (score,), MODEL, "chat", USAGE, TIMINGS))["results"][0]
        for request in requests
    ]

    assert [result["reward"] for result in results] == [1.5, 1.5]
    assert results[0]["reward_lower"] == lower
    assert "reward_lower" not in results[1]


@pytest.mark.parametrize("options", [{}, {"diagnostics": "basic"}, {"diagnostics": "none"}])
def test_pessimism_needs_the_level_that_reads_states(options: dict[str, str]) -> None:
    """It is refused where the level, also the default one, has no disagreement: no silent null."""
    assert violations(body_of(pessimism=1.0, **options)) == [("/pessimism", "needs_level_full")]


@pytest.mark.parametrize("value", [-0.1, 1001, "1", [1]])
def test_pessimism_is_a_number_of_standard_deviations(value: object) -> None:
    """Values that are no number of at least 0, or so large that a reward could overflow, are refused by pointer."""
    ((pointer, _),) = violations(body_of(pessimism=value, diagnostics="full"))

    assert pointer == "/pessimism"


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rewards_keep_every_digit(reward: float) -> None:
    """The reward on the wire is the float32 of the Score, bit for bit, without diagnostics."""
    answer = json.loads(
        render_scores(
            request_of(Item(TemplatedText("a")), diagnostics="none"), (Score(reward),), MODEL, "chat", USAGE, TIMINGS
        )
    )

    assert answer["results"] == [{"index": 0, "reward": reward}]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_non_finite_reward_is_not_rendered(reward: float) -> None:
    """A Score that is not finite raises instead of becoming null."""
    with pytest.raises(NonFiniteReward):
        render_scores(request_of(Item(TemplatedText("a"))), (Score(reward),), MODEL, "chat", USAGE, TIMINGS)


def test_missing_outcome_raises() -> None:
    """A wrong number of outcomes raises; results are never shifted."""
    with pytest.raises(ValueError, match="shorter"):
        render_scores(
            request_of(Item(TemplatedText("a")), Item(TemplatedText("b"))), (Score(1.0),), MODEL, "chat", USAGE, TIMINGS
        )


def test_win_probabilities_by_hand() -> None:
    """Rewards 0 and ln 3 give odds of 1 to 3 (Bradley and Terry); the diagonal is one half."""
    table = win_probabilities([0.0, math.log(3.0)])

    assert table == [[0.5, pytest.approx(0.25)], [pytest.approx(0.75), 0.5]]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=5))
def test_win_probabilities_are_probabilities(rewards: list[float]) -> None:
    """For all rewards each pair sums to one, is within [0, 1], and favours the higher reward."""
    table = win_probabilities(rewards)

    for i, row in enumerate(rewards):
        for j, column in enumerate(rewards):
            assert 0.0 <= table[i][j] <= 1.0
            assert table[i][j] + table[j][i] == pytest.approx(1.0)
            assert (table[i][j] >= 0.5) == (row >= column) or table[i][j] == pytest.approx(0.5)


def test_comparison_names_the_best() -> None:
    """A comparison has rewards, probabilities and the index of the highest reward."""
    items = (Item(Exchange("p", "a")), Item(Exchange("p", "b")))

    answer = json.loads(render_comparison(request_of(*items), (Score(0.0), Score(2.0)), MODEL, "chat", USAGE, TIMINGS))

    assert (answer["rewards"], answer["best"]) == ([0.0, 2.0], 1)
    assert answer["probabilities"][1][0] == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_comparison_with_an_item_error() -> None:
    """One completion without a reward fails the comparison with that completion's error."""
    items = (Item(Exchange("p", "a")), Item(Exchange("p", "b")))
    error = SequenceTooLong("9 tokens; the limit is 8")

    with pytest.raises(SequenceTooLong):
        render_comparison(request_of(*items), (Score(0.0), error), MODEL, "chat", USAGE, TIMINGS)


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_conversations_of_agents() -> None:
    """Tools, calls, tool turns, text parts and completions of several messages are read as chat templates get them."""
    completion = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "It is two.", "reasoning_content": "easy"},
    ]

    item = {"prompt": [{"role": "user", "content": "?"}], "completion": completion, "tools": TOOLS}
    request = parse_score_request(body_of(items=[item], chat_template_kwargs={"enable_thinking": False}), DEFAULTS)

    (content,) = [item.content for item in request.items]
    assert isinstance(content, Exchange)
    assert isinstance(content.completion, tuple)
    assert [turn.as_dict() for turn in content.completion] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": 2}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "It is two.", "reasoning_content": "easy"},
    ]
    assert json.loads(content.tools) == TOOLS
    assert content.completion_text == "\nIt is two."
    assert request.encoding.template_variables == (("enable_thinking", False),)


def test_one_assistant_message_is_its_text() -> None:
    """A completion of one assistant message that is only text is the same item as its text."""
    completion = [{"role": "assistant", "content": "c"}]

    request = parse_score_request(body_of(items=[{"prompt": "p", "completion": completion}]), DEFAULTS)
    ranked = {"prompt": "p", "completions": [completion, "d"], "tools": TOOLS}
    compared = parse_compare_request(json.dumps(ranked).encode(), DEFAULTS)

    assert request.items == (Item(Exchange("p", "c")),)
    assert [item.content for item in compared.items] == [Exchange("p", text, json.dumps(TOOLS)) for text in ("c", "d")]


@pytest.mark.parametrize(
    ("item", "violation"),
    [
        ({"prompt": [{"role": "user"}], "completion": "c"}, ("/items/0/prompt/0/content", "missing_field")),
        ({"prompt": "p", "completion": []}, ("/items/0/completion", "out_of_range")),
        ({"prompt": "p", "completion": [{"role": "user", "content": CANARY}]}, ("/items/0/completion", "out_of_range")),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": CANARY}]}], "completion": "c"},
            ("/items/0/prompt/0/content/0/type", "out_of_range"),
        ),
        (
            {"prompt": "p", "completion": [{"role": "assistant", "tool_calls": [{"name": CANARY}]}]},
            ("/items/0/completion/0/tool_calls/0", "wrong_type"),
        ),
        ({"text": "t", "tools": TOOLS}, ("/items/0", "not_one_form")),
    ],
    ids=["no-content", "no-turn", "not-the-assistant", "image", "no-function", "tools-with-text"],
)
def test_messages_that_no_template_gets(item: dict[str, object], violation: tuple[str, str]) -> None:
    """A malformed message is refused with a pointer to the value, without its text."""
    assert violations(body_of(items=[item])) == [violation]
