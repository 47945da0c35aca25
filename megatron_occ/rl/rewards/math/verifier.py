r"""Verifiers for mathematics: the response's final answer against the reference.

Pure Python on text, bounded in time: expressions are read by a grammar of our own and compared by
exact arithmetic or at points to 60 digits; numbers too large to be an answer are never computed.
"""

from __future__ import annotations

from functools import lru_cache

from megatron_occ.rl.rewards.math.answer import read_answers
from megatron_occ.rl.rewards.math.compare import equal, is_choice
from megatron_occ.rl.rewards.math.extract import candidates, is_empty_box
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
    gold = reference(answer)
    found = _final_answer(response, gold, order)
    return float(found is not None and any(equal(gold, each) for each in found))


@lru_cache(4096)
def reference(answer: str) -> Answer:
    """The reading of a reference.

    Raises:
        ValueError: it is empty.
    """
    given = (texts for texts in (*candidates(answer), (answer,)) if any(map(normalize, texts)))
    texts = next(given, None)
    if texts is None or is_empty_box(texts[0]):
        raise ValueError(f"reference answer {answer!r:.80} is empty: no response could be right")
    found = next(read_answers(texts))
    # the letter of a choice: "(B) 12 cm" is one too
    return Leaf(found.text) if isinstance(found, Leaf) and is_choice(found.text) else found


def _final_answer(response: str, gold: Answer, order: str) -> list[Answer] | None:
    for texts in candidates(response, order):
        if len(texts) > 1 and not isinstance(gold, Group):
            texts = texts[-1:]
        if sum(map(len, texts)) > MAX_ANSWER_CHARS:
            return None
        readings = list(read_answers(texts))
        for reading in readings:
            if gold.is_text or not reading.is_text:
                return readings if gold.is_text else [reading]
    return None
