r"""Verifiers for mathematics: the response's final answer against the reference.

Pure Python on text, bounded in time: expressions are read by a grammar of our own and compared by
exact arithmetic or at points to 60 digits; numbers too large to be an answer are never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from megatron_occ.data.boxes import is_empty_box
from megatron_occ.rl.rewards.math.answer import read_answers
from megatron_occ.rl.rewards.math.compare import equal, is_choice
from megatron_occ.rl.rewards.math.extract import Candidate, candidates
from megatron_occ.rl.rewards.math.forms import Answer, Group, Leaf
from megatron_occ.rl.rewards.math.normalize import normalize

# A longer "answer" is a runaway generation, not an answer.
MAX_ANSWER_CHARS = 1000


def math_verifier(response: str, answer: str) -> float:
    r"""1.0 when the final answer of the response is ``answer``, else 0.0.

    The final answer is the last ``\boxed{...}``; without one, what follows the last ``####``;
    without that, what follows the last "answer:" or "answer is", on its line or the next. Of the
    last two, one that is no number or expression is passed over unless the reference is none
    either. See docs/verifiers.md for what counts as equal.

    Args:
        response: whole text.
        answer: the reference: in one of these forms, or just the answer.

    Raises:
        ValueError: ``answer`` is empty.
    """
    return _score(response, answer, "math")


def math_dapo_verifier(response: str, answer: str) -> float:
    """As :func:`math_verifier`, but a line of ``Answer:`` comes before any box (DAPO)."""
    return _score(response, answer, "math_dapo")


def _score(response: str, answer: str, order: str) -> float:
    return float(_is_right(response, reference(answer), order))


@lru_cache(4096)
def reference(answer: str) -> Answer:
    """The reading of a reference.

    Raises:
        ValueError: it is empty.
    """
    given = (*candidates(answer), Candidate((answer,), False))
    # the boxes of a reference belong together
    texts = max((c.texts for c in given[:-1] if not c.in_words), key=len, default=None)
    if texts is None:
        texts = next((c.texts for c in given if any(map(normalize, c.texts))), None)
    if texts is None or is_empty_box(texts[0]):
        raise ValueError(f"reference answer {answer!r:.80} is empty: no response could be right")
    readings = list(read_answers(texts))
    found = next((each for each in readings if not each.is_text), readings[0])
    # the letter of a choice: "(B) 12 cm" is one too
    return Leaf(found.text) if isinstance(found, Leaf) and is_choice(found.text) else found


def _is_right(response: str, gold: Answer, order: str) -> bool:
    """Whether a candidate that the response commits to says what the reference says."""
    tried = commitments(response, gold, order)
    return any(equal(gold, each) for _, readings in tried for each in readings)


def commitments(
    response: str, gold: Answer, order: str
) -> Iterator[tuple[tuple[str, ...], list[Answer]]]:
    """What is taken for a response's answer: the first candidate that is of the reference's kind.

    Where the reference is a group, a box that is none is followed by the boxes beside it.

    Args:
        response: whole text.
        gold: reading of the reference.
        order: of ``candidates``.

    Returns:
        Texts of the answer and its readings, one of which at least.
    """
    for texts, in_words in candidates(response, order):
        if sum(map(len, texts)) > MAX_ANSWER_CHARS:
            return
        readings = [
            each
            for each in read_answers(texts, in_words=in_words)
            if gold.is_text or not each.is_text
        ]
        if readings:
            yield texts, readings
        # a box commits, and so does whatever is of the right kind
        is_last = not isinstance(gold, Group) or len(texts) > 1 or in_words
        if readings and is_last:
            return
