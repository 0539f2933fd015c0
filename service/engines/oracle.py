"""An engine without a model: its reward is a known function of the token ids.

The expected reward can be computed from the text alone, so a test detects a lost, swapped, duplicated, padded or
silently truncated answer, bit for bit. Serving it requires no weights; computing an expected reward requires the
standard library alone.

The tokenizer is byte-level: token id = value of the UTF-8 byte (0 to 255), with one special token, the pad token (256).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from service.engines.base import EngineInfo, EngineOutput
from service.errors import EngineOutOfMemory
from service.records import BatchCost, TokenSequence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"  # noqa: S105  a token of text, not a secret
PAD_TOKEN_ID = 256

RAISE_BYTE, NAN_BYTE, INFINITY_BYTE, MEMORY_BYTE = 0x01, 0x02, 0x03, 0x04
"""Control characters that do not occur in ordinary texts; they trigger faults where these are enabled."""


def oracle_reward(token_ids: Sequence[int], salt: str = "") -> float:
    """Return the reward of a token sequence.

    h24 = BLAKE2b with a digest of 3 bytes, keyed with the salt, over the ids as 32-bit little-endian integers; reward =
    (h24 - 2^23) / 2^20, h24 read as a little-endian integer. It lies in [-8, 8), is exact in float32, depends on every
    id and its position, and two sequences share it with probability 2^-24.

    Args:
        token_ids: without padding, each in [0, 2^32).
        salt: at most 64 bytes of UTF-8; different salts represent different model versions.
    """
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    digest = blake2b(packed, digest_size=3, key=salt.encode()).digest()
    return float((int.from_bytes(digest, "little") - 2**23) / 2**20)


def oracle_reward_of_text(prompt: str, completion: str, salt: str = "") -> float:
    """Return the reward of a plain-string prompt and completion under the ``concat`` template: bytes after bytes."""
    return oracle_reward((prompt + completion).encode(), salt)


def byte_tokenizer(max_input_tokens: int = 4096) -> PreTrainedTokenizerFast:
    """Build the tokenizer of the oracle in memory: ids are byte values, nothing is added and nothing is merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_visible_bytes())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        model_max_length=max_input_tokens,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True, slots=True)
class OracleFaults:
    """Faults of an oracle, for tests; each is off by default and no setting of the service enables one."""

    raise_on: int | None = None
    """The token id that makes a pass raise."""

    nan_on: int | None = None
    """The token id that makes the reward of its sequence NaN."""

    infinity_on: int | None = None
    """The token id that makes the reward of its sequence infinite."""

    memory_on: int | None = None
    """The token id that makes a pass run out of memory."""

    memory_tokens: int | None = None
    """A pass over more tokens runs out of memory."""

    seconds_per_token: float = 0.0
    """The duration of a pass per token."""

    leaked_bytes: int = 0
    """Bytes of memory that stay in use for each sequence, so that a test of memory growth can be tested itself."""

    @classmethod
    def by_control_bytes(cls) -> OracleFaults:
        """Return the faults that a text can trigger over HTTP, by the control characters named in this module."""
        return cls(raise_on=RAISE_BYTE, nan_on=NAN_BYTE, infinity_on=INFINITY_BYTE, memory_on=MEMORY_BYTE)


class OracleFaultError(Exception):
    """A pass raised because of ``OracleFaults.raise_on``."""


class OracleEngine:
    """Scores each sequence with `oracle_reward` of its ids."""

    def __init__(
        self,
        *,
        salt: str = "",
        max_input_tokens: int = 4096,
        max_batch_tokens: int = 4096,
        cost: BatchCost = "packed",
        faults: OracleFaults | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._salt = salt
        self._faults = faults or OracleFaults()
        self._sleep = sleep
        self._leaked: list[bytes] = []
        self._info = EngineInfo(
            engine="oracle",
            architecture="oracle",
            forward=cost,
            device="cpu",
            dtype="float32",
            cost=cost,
            max_input_tokens=max_input_tokens,
            max_batch_tokens=max_batch_tokens,
        )

    @property
    def info(self) -> EngineInfo:
        """The description of the oracle, as of a model."""
        return self._info

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        """Score the sequences, one known reward for each and for each step; there are no taps, hence no states.

        Raises:
            EngineOutOfMemory, OracleFaultError: the faults that are enabled.
        """
        del states
        self._apply_faults(sequences)
        rewards = [self._reward(sequence.token_ids) for sequence in sequences]
        if not any(sequence.step_positions for sequence in sequences):
            return EngineOutput(rewards)
        return EngineOutput(rewards, outputs=[self._with_steps(*pair) for pair in zip(sequences, rewards, strict=True)])

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return zero: nothing is cached."""
        del sequence
        return 0

    def close(self) -> None:
        """Do nothing: the oracle holds no memory."""

    def _with_steps(self, sequence: TokenSequence, reward: float) -> NDArray[np.float32]:
        """Return [steps + 1, 1]: the reward of a step is that of the tokens up to its last one."""
        import numpy as np

        steps = [self._reward(sequence.token_ids[: position + 1]) for position in sequence.step_positions]
        return np.array([*steps, reward], np.float32)[:, None]

    def _reward(self, token_ids: Sequence[int]) -> float:
        if self._faults.nan_on in token_ids:
            return float("nan")
        if self._faults.infinity_on in token_ids:
            return float("inf")
        return oracle_reward(token_ids, self._salt)

    def _apply_faults(self, sequences: Sequence[TokenSequence]) -> None:
        faults = self._faults
        num_tokens = sum(sequence.num_tokens for sequence in sequences)
        if faults.leaked_bytes:
            self._leaked.append(b"x" * (faults.leaked_bytes * len(sequences)))
        if faults.seconds_per_token:
            self._sleep(num_tokens * faults.seconds_per_token)
        if faults.memory_tokens is not None and num_tokens > faults.memory_tokens:
            raise EngineOutOfMemory(f"{num_tokens} tokens; the oracle is configured to hold {faults.memory_tokens}.")
        if any(faults.memory_on in sequence.token_ids for sequence in sequences):
            raise EngineOutOfMemory("The oracle is configured to run out of memory on this token.")
        if any(faults.raise_on in sequence.token_ids for sequence in sequences):
            raise OracleFaultError("The oracle is configured to raise on this token.")


def _visible_bytes() -> list[str]:
    """Return the characters by which byte-level BPE writes the bytes 0 to 255.

    Printable Latin-1 bytes are their own characters; the others take the code points from 256 on, in order (Radford et
    al., 2019, the GPT-2 encoder).
    """
    unchanged = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = iter(range(0x100, 0x200))
    return [chr(byte if byte in unchanged else next(replacements)) for byte in range(0x100)]
