"""Weighted prompts as text: what is read, what is refused."""

import random

import pytest

from app.core.errors import InvalidParams
from app.core.prompt_weights import MAX_PARTS, check, parse

SEED = 20261124


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a red lamp", [("a red lamp", 1)]),
        ("a (red:1.3) lamp", [("a", 1), ("red", 1.3), ("lamp", 1)]),
        ("a (red) lamp", [("a", 1), ("red", 1.1), ("lamp", 1)]),
        ("a ((red)) lamp", [("a", 1), ("red", 1.21), ("lamp", 1)]),
        ("a [dim] lamp", [("a", 1), ("dim", 1 / 1.1), ("lamp", 1)]),
        ("(a (red:2) lamp:0.5)", [("a", 0.5), ("red", 1), ("lamp", 0.5)]),
        ("(a: b :1.5)", [("a: b", 1.5)]),
        (r"a smiley :\(, (sad\):0.4)", [("a smiley :(,", 1), ("sad)", 0.4)]),
        ("12:30, a clock", [("12:30, a clock", 1)]),
        ("( ) a ()", [("a", 1)]),
    ],
)
def test_brackets_weigh_what_is_in_them(prompt, parts):
    found = parse(prompt)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a (lamp", "not closed"),
        ("(" * 21 + "a" + ")" * 21, "20 deep"),
        ("a lamp)", "closes nothing"),
        ("a [lamp)", "closes nothing"),
        ("(a:1.2.3)", "no weight"),
        ("(a:3.1)", "possible"),
        ("(a:-1)", "possible"),
        ("[cat:dog:0.5]", "not known"),
        ("[cat|dog]", "not known"),
        ("a cat <lora:flat:1>", "in loras"),
        (" ".join(f"(a:1.{i % 9 + 1})" for i in range(MAX_PARTS + 1)), "parts"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(prompt, why):
    with pytest.raises(InvalidParams, match=why) as caught:
        check(prompt, "prompt")
    assert caught.value.message.startswith("prompt: ")


def test_whatever_is_written_is_read_or_refused():
    rng = random.Random(SEED)
    read = 0
    for _ in range(5000):
        prompt = "".join(rng.choice("()[]:\\a 1.|") for _ in range(rng.randint(0, 14)))
        try:
            parts = parse(prompt)
        except ValueError:
            continue
        read += 1
        assert all(part.text and 0 <= part.weight <= 3 for part in parts)
    assert read > 500, f"seed {SEED}"
