"""Which of several responses give the same final answer, for a majority vote among them."""

from __future__ import annotations

from megatron_occ.rl.rewards.math.compare import equal
from megatron_occ.rl.rewards.math.forms import Answer
from megatron_occ.rl.rewards.math.verifier import commitments, reference

# of a correct response, and of one without an answer; wrong answers count from 1
_RIGHT, _NO_ANSWER = 0, -1


def math_votes(responses: list[str], answer: str, right: list[bool]) -> list[tuple[str, int]]:
    """The final answer of each response as ``math_verifier`` reads it, and its group.

    Args:
        responses: whole texts.
        answer: the reference: it says which kind of answer is looked for.
        right: whether the verifier scored them as correct; these are one group.

    Returns:
        Text of the answer ("" where there is none) and group of each response: 0 if it is
        correct, -1 without an answer. Wrong answers that are equal, in either direction, share a
        number from 1 on; each is compared with the first one of a group.

    Raises:
        ValueError: ``answer`` is empty.
    """
    return _votes(responses, answer, right, "math")


def math_dapo_votes(responses: list[str], answer: str, right: list[bool]) -> list[tuple[str, int]]:
    """As :func:`math_votes`, of what ``math_dapo_verifier`` reads."""
    return _votes(responses, answer, right, "math_dapo")


def _votes(
    responses: list[str], answer: str, right: list[bool], order: str
) -> list[tuple[str, int]]:
    gold = reference(answer)
    known: dict[str, int] = {}
    firsts: list[list[Answer]] = []
    found = []
    for response, is_right in zip(responses, right, strict=True):
        *_, (texts, readings) = ((), []), *commitments(response, gold, order)
        text = ", ".join(texts)
        if is_right or not text:
            found.append((text, _RIGHT if is_right else _NO_ANSWER))
            continue
        if text not in known:
            known[text] = _group(readings, firsts)
        found.append((text, known[text]))
    return found


def _group(readings: list[Answer], firsts: list[list[Answer]]) -> int:
    """Number of the group that an answer belongs to; a new one is added to ``firsts``."""
    for number, first in enumerate(firsts, start=1):
        if any(equal(a, b) or equal(b, a) for a in first for b in readings):
            return number
    firsts.append(readings)
    return len(firsts)
