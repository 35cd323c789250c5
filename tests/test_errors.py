"""Complaints: their wording, their facts, and their way across processes."""

import pickle
from typing import Any

import pytest

from ggcl_fast import CheckpointError, NotACheckpointError, SourceChangedError, TruncatedError
from ggcl_fast.errors import printable

FACTS: dict[str, Any] = {
    "source": "a.ggcl", "tensor": "blk.1.attn_q.weight.lora_b", "index": 37, "field": "dims", "offset": 6720,
    "expected": (4, 4096), "found": (4, 4095), "hint": "try another",
}  # fmt: skip


def test_a_message_says_file_place_expected_found_and_the_next_step() -> None:
    assert str(CheckpointError(**FACTS)) == (
        "a.ggcl: tensor 37 'blk.1.attn_q.weight.lora_b': dims at offset 6720 (0x1a40): "
        "expected (4, 4096), found (4, 4095) (try another)"
    )


@pytest.mark.parametrize("kind", [CheckpointError, NotACheckpointError, SourceChangedError, TruncatedError])
def test_errors_keep_their_facts_when_pickled(kind: type[CheckpointError]) -> None:
    error = pickle.loads(pickle.dumps(kind("in words", **FACTS)))
    assert type(error) is kind
    assert {name: getattr(error, name) for name in FACTS} == FACTS
    assert str(error) == str(kind("in words", **FACTS))
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü", "plain ü"),
        ("a\x1b[31m\n\0", r"a\x1b[31m\n\x00"),
        (b"\xff\xfebad", r"\xff\xfebad"),
        ("\u202eevil", r"\u202eevil"),
        ("x" * 100, "x" * 80 + "..."),
    ],
)
def test_names_are_shown_without_harm(text: str | bytes, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("part", ["problem", "source", "tensor", "field", "expected", "found", "hint"])
def test_every_part_of_a_message_is_escaped_and_shortened(part: str) -> None:
    facts: dict[str, Any] = {"problem": "bad", "expected": "x", "found": "y"}
    for text in ("\x1b]0;owned\x07\x1b[31mx\nggcl-fast: note: all is well", "A" * 1_000_000, "\u202e\udc80"):
        error = CheckpointError(**{**facts, part: text})
        assert str(error).isprintable()
        assert len(str(error)) < 5000
        assert getattr(error, part) == text  # programs get all of it
