"""Verifier for mathematics: the response's final answer against the reference, with math-verify.

The final answer is cut out here, and only that goes to math-verify, through its LaTeX grammar.
Its parser for plain expressions ends in sympy's ``parse_expr``, which is Python's ``eval``, and is
therefore not used on model output.

Importing this module imports sympy, which takes a while: the registry names it by its path.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

# It warns that its time limits are off, and about each answer that it cannot parse.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# A longer "answer" is a runaway generation, not an answer; the grammar is slow on long input.
MAX_ANSWER_CHARS = 1000
# The phrase and its answer are looked for in the end of the response only.
_PHRASE_WINDOW_CHARS = 2000

_BOXED = "\\boxed{"
_LATEX_ONLY = (LatexExtractionConfig(boxed_match_priority=0),)
_HASH_MARK = "####"
_PHRASE = re.compile(r"answer\s*(?:is\s*:?|:)(.*?)(?:\.\s|$)", re.IGNORECASE | re.MULTILINE)
# Not the point of "\right.", which closes a bracket with nothing.
_FULL_STOP = re.compile(r"\s*(?<!\\right)\.+$")


def math_verifier(response: str, answer: str) -> float:
    r"""1.0 when the final answer of the response equals ``answer`` mathematically, else 0.0.

    The final answer is the last ``\boxed{...}``; without one, what follows the last ``####``;
    without that, what follows the last "answer is" or "answer:" up to the end of the sentence or
    line. A response that commits to no answer scores 0.0, and so does one whose last box is not
    closed.

    ``answer`` may itself be in one of these forms, or just the expression. Raises ValueError when
    nothing can be parsed from it: then no response could ever be right.

    This can take arbitrarily long on hostile input: call it through ``VerifierPool``.
    """
    gold = extract_answer(answer) or _clean(answer)
    predicted = extract_answer(response)
    if predicted is None or len(predicted) > MAX_ANSWER_CHARS:
        return 0.0
    if predicted == gold:
        return 1.0
    parsed_gold = _parse(gold)
    if not parsed_gold:
        raise ValueError(f"reference answer {answer!r:.80} is not a mathematical expression")
    # Without the library's time limits: they are signals, which only the main thread can use.
    return float(verify(parsed_gold, _parse(predicted), timeout_seconds=None))


def extract_answer(text: str) -> str | None:
    r"""The final answer of a text, or None: see ``math_verifier`` for where it is looked for."""
    start = text.rfind(_BOXED)
    if start >= 0:
        boxed = _balanced(text, start + len(_BOXED))
        return None if boxed is None else _clean(boxed) or None
    if _HASH_MARK in text:
        lines = text.rpartition(_HASH_MARK)[2].strip().splitlines()
        return (_clean(lines[0]) or None) if lines else None
    phrases = _PHRASE.findall(text[-_PHRASE_WINDOW_CHARS:])
    return (_clean(phrases[-1]) or None) if phrases else None


def _balanced(text: str, start: int) -> str | None:
    """Text from ``start`` to the brace that closes the one before it, None when it is missing."""
    depth = 1
    position = start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1  # the next character is escaped
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


def _clean(answer: str) -> str:
    """Strip what Markdown, LaTeX and prose put around an answer."""
    stripped = _FULL_STOP.sub("", answer.strip().strip("*").strip())
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(stripped) > len(opening + closing) and stripped.startswith(opening):
            stripped = stripped.removeprefix(opening).removesuffix(closing).strip()
            break
    return _FULL_STOP.sub("", stripped)


def _parse(answer: str) -> list[Any]:
    return parse(_BOXED + answer + "}", extraction_config=_LATEX_ONLY, parsing_timeout=None)


# The first call builds the grammar's tables, which takes longer than many a time limit for one
# answer: done here, it counts as loading the verifier.
math_verifier(_BOXED + "2}", "1 + 1")
