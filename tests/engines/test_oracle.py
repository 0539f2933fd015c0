"""The oracle's reward follows its documented formula, from ids and from text, and its faults are off by default."""

from __future__ import annotations

import hashlib
import math
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engines.oracle import (
    NAN_BYTE,
    RAISE_BYTE,
    OracleEngine,
    OracleFaultError,
    OracleFaults,
    byte_tokenizer,
    oracle_reward,
    oracle_reward_of_text,
)
from service.errors import EngineOutOfMemory
from service.records import Encoding, Exchange, Item, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization

ids = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30)


@pytest.mark.parametrize(("token_ids", "salt"), [((1, 2, 3), ""), ((0,), ""), ((70_000, 256, 5), "v2")])
def test_reward_is_the_documented_hash(token_ids: tuple[int, ...], salt: str) -> None:
    """An independent implementation of the documented formula gives the same number."""
    packed = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)
    low, middle, high = hashlib.blake2b(packed, digest_size=3, key=salt.encode()).digest()

    assert oracle_reward(token_ids, salt) == (low + 256 * middle + 65536 * high - 2**23) / 2**20


@settings(deadline=None)
@given(ids)
def test_reward_is_exact_in_float32(token_ids: list[int]) -> None:
    """A reward survives conversion to float32 and back bit for bit, and lies in [-8, 8)."""
    reward = oracle_reward(token_ids)

    assert struct.unpack("<f", struct.pack("<f", reward))[0] == reward
    assert -8 <= reward < 8


@settings(deadline=None)
@given(ids, ids)
def test_different_sequences_have_different_rewards(first: list[int], second: list[int]) -> None:
    """Another order, a repetition or a missing id is another reward."""
    if first != second:
        assert oracle_reward(first) != oracle_reward(second)
    assert oracle_reward(first) != oracle_reward([*first, 0])


def test_another_salt_is_another_model() -> None:
    """The same ids have another reward under another salt, so a mixed batch of two versions is visible."""
    assert oracle_reward((1, 2, 3), "a") != oracle_reward((1, 2, 3), "b")


@pytest.mark.parametrize(("prompt", "completion"), [("How?", " So."), ("", "x"), ("naïve 🙂\n\t\x00", "日本 <s> </s>")])
def test_reward_follows_from_the_text_alone(prompt: str, completion: str) -> None:
    """Tokenizing with the byte tokenizer gives the ids from which a client computes the reward without a tokenizer."""
    tokenizer = byte_tokenizer()
    tokenization = Tokenization(tokenizer, TokenizationSettings(), max_input_tokens=4096, vocab_size=len(tokenizer))

    (sequence,) = tokenization.encode([Item(Exchange(prompt, completion))], Encoding(template="concat"))

    assert isinstance(sequence, TokenSequence)
    assert bytes(sequence.token_ids) == (prompt + completion).encode()
    assert OracleEngine().forward([sequence]).rewards == [oracle_reward_of_text(prompt, completion)]


def test_expected_rewards_need_no_heavy_library() -> None:
    """A client computes expected rewards without torch, transformers or tokenizers."""
    program = (
        "import sys; from service.engines.oracle import oracle_reward_of_text as reward; reward('a', 'b');"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_faults_are_off_by_default() -> None:
    """Without faults the control bytes are tokens like all others."""
    rewards = OracleEngine().forward([TokenSequence((RAISE_BYTE, NAN_BYTE))]).rewards

    assert rewards == [oracle_reward((RAISE_BYTE, NAN_BYTE))]


def test_enabled_faults_occur() -> None:
    """Each fault occurs as documented: raise, return NaN, run out of memory, take time."""
    sleeps: list[float] = []
    faults = OracleFaults(raise_on=1, nan_on=2, infinity_on=3, memory_tokens=4, seconds_per_token=0.5)
    engine = OracleEngine(faults=faults, sleep=sleeps.append)

    with pytest.raises(OracleFaultError):
        engine.forward([TokenSequence((9, 1))])
    with pytest.raises(EngineOutOfMemory):
        engine.forward([TokenSequence((9, 9, 9)), TokenSequence((9, 9))])
    nan, infinity, good = engine.forward([TokenSequence((2,)), TokenSequence((3,)), TokenSequence((9,))]).rewards

    assert math.isnan(nan)
    assert infinity == math.inf
    assert good == oracle_reward((9,))
    assert sleeps == [1.0, 2.5, 1.5]
