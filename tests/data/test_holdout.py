"""The rule that excludes calibration prompts from training."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from service.data.holdout import is_held_out
from service.records import Message


def test_the_rule_is_the_documented_one() -> None:
    """An implementation after the docstring gives the same result; another rule would invalidate earlier hold-outs."""
    prompts = [f"Question  number {n}?" for n in range(50)]

    expected = [
        int.from_bytes(hashlib.sha256(f"question number {n}?".encode()).digest()[:8], "big") % 10_000 < 2_500
        for n in range(50)
    ]

    assert [is_held_out(prompt) for prompt in prompts] == expected
    assert 0 < sum(expected) < 50


def test_conversations_with_the_same_first_user_message_are_not_separated() -> None:
    """Only the first user message counts, without case and spacing, so later messages cannot separate two prompts."""
    for n in range(40):
        opening = f"How do I sort {n} apples?"
        conversation = (
            Message("system", "Be brief."),
            Message("user", f"  how do I\nSORT {n} apples? "),
            Message("assistant", "By size."),
            Message("user", "And then?"),
        )

        assert is_held_out(conversation) == is_held_out(opening)


@given(st.text())
def test_a_larger_percentage_holds_out_a_superset(prompt: str) -> None:
    """0 percent holds out nothing, 100 percent everything, and each percentage contains the smaller ones."""
    decisions = [is_held_out(prompt, percent) for percent in (0, 10, 25, 60, 100)]

    assert decisions == sorted(decisions)
    assert (decisions[0], decisions[-1]) == (False, True)


def test_the_share_of_held_out_prompts_is_the_percentage() -> None:
    """A quarter of many prompts is held out (within four standard errors)."""
    held_out = sum(is_held_out(f"prompt {n}") for n in range(4_000))

    assert abs(held_out - 1_000) < 4 * (4_000 * 0.25 * 0.75) ** 0.5


def test_a_conversation_without_a_user_message_is_identified_by_its_first() -> None:
    """The rule is defined for every prompt, also for an empty conversation."""
    assert is_held_out((Message("system", "Hello"),)) == is_held_out("hello")
    assert is_held_out(()) == is_held_out("")
