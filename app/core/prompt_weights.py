r"""Weighted prompts in the spelling that A1111's web UI made common: "a (red:1.3) [dim] ((bright)) lamp".

(word) counts 1.1 times as much, [word] 1/1.1 times, (word:1.3) as much as it says; they nest and multiply, and \( is a
parenthesis. What that UI knows besides, editing and alternation and adapters in the prompt, is refused.
"""

import re
from typing import Final, NamedTuple

from app.core.errors import InvalidParams

STEP: Final = 1.1
LEAST, MOST = 0.0, 3.0
MAX_DEPTH: Final = 20
MAX_PARTS: Final = 100  # each that counts less than the rest is encoded once more
_TOKEN: Final = re.compile(r"\\[()\[\]\\]|:\s*([+-]?[0-9.]+)\s*\)|[()\[\]]|[^()\[\]\\:]+|.", re.DOTALL)
_ADAPTER: Final = re.compile(r"<(lora|lyco|hypernet):", re.IGNORECASE)


class Part(NamedTuple):
    """Some words, and how much they count; 1 as much as if nothing were said."""

    text: str
    weight: float


class _Open(NamedTuple):
    bracket: str
    first: int  # of the parts inside


def check(prompt: str, name: str) -> None:
    """Return if a prompt can be read. Raises InvalidParams, which begins with `name`."""
    try:
        parse(prompt)
    except ValueError as error:
        raise InvalidParams(f"{name}: {error}; write \\( for a parenthesis, or leave prompt_weighting out") from error


def parse(prompt: str) -> list[Part]:
    """The parts of a prompt in their order, none of them empty; no part for an empty one. Raises ValueError."""
    if _ADAPTER.search(prompt):
        raise ValueError("adapters are not named in the prompt, but in loras")
    parts: list[Part] = []
    opened: list[_Open] = []
    for found in _TOKEN.finditer(prompt):
        text = found[0]
        if text in ("(", "["):
            opened.append(_Open(text, len(parts)))
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"brackets nest {MAX_DEPTH} deep at most")
        elif text in (")", "]") or found[1]:
            _close(parts, opened, text[-1], _number(found[1]) if found[1] else None)
        else:
            parts.append(Part(text[1:] if len(text) == 2 and text[0] == "\\" else text, 1.0))
    if opened:
        raise ValueError(f"{opened[-1].bracket} is not closed")
    return _checked(_joined(parts))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no weight") from None


def _close(parts: list[Part], opened: list[_Open], bracket: str, weight: float | None) -> None:
    closes = "[" if bracket == "]" else "("
    if not opened or opened[-1].bracket != closes:
        raise ValueError(f"{bracket} closes nothing")
    first = opened.pop().first
    if closes == "[" and any(mark in part.text for part in parts[first:] for mark in "|:"):
        raise ValueError("[from:to:when] and [one|other] are not known")
    factor = weight if weight is not None else STEP if closes == "(" else 1 / STEP
    for i in range(first, len(parts)):
        parts[i] = Part(parts[i].text, parts[i].weight * factor)


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours that count the same are one part; what has no words is none."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1].weight == part.weight:
            found[-1] = Part(found[-1].text + part.text, part.weight)
        else:
            found.append(part)
    return [Part(part.text.strip(), part.weight) for part in found if part.text.strip()]


def _checked(parts: list[Part]) -> list[Part]:
    for part in parts:
        if not LEAST <= part.weight <= MOST:
            raise ValueError(f"{part.text[:40]!r} counts {part.weight:g} times; {LEAST:g} to {MOST:g} are possible")
    if len(parts) > MAX_PARTS:
        raise ValueError(f"it has {len(parts)} parts of different weight; {MAX_PARTS} are possible")
    return parts
