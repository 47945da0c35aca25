"""Verifiers that only compare text: linear in the response, safe to run in the trainer."""

from __future__ import annotations

ARITHMETIC_STOP = "."


def exact_verifier(response: str, answer: str) -> float:
    """1.0 when response and answer are the same text, spaces around them aside, else 0.0."""
    return float(response.strip() == answer.strip())


def arithmetic_verifier(response: str, answer: str) -> float:
    """1.0 when the text after the last ``=`` up to the first ``.`` behind it is the answer.

    For the generated tasks. Their prompts end in ``=``: a response without one is taken from its
    start. A response without the terminator behind its last ``=`` scores 0.0, and so does one with
    a space in the result: the comparison is exact and nothing is evaluated.
    """
    result, stop, _ = response.rpartition("=")[2].partition(ARITHMETIC_STOP)
    return float(bool(stop) and result == answer)
