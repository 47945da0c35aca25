r"""Where the final answer of a response stands: boxes, a mark ``####``, or the word "answer"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_occ.data.boxes import has_box, last_boxes

BOX, HASH, PHRASE, LINE = "box", "hash", "phrase", "line"
# What each order looks for, first to last. "line" is an ``Answer:`` of its own.
ORDERS = {"math": (BOX, HASH, PHRASE), "math_dapo": (LINE, BOX, HASH, PHRASE)}

# The word "answer" and what follows it are looked for in the end of a response only.
_WINDOW_CHARS = 2000
# Announcements that are looked at.
_MAX_PLACES = 50

_HASH = re.compile(r"#{4}(?!#)")
# "Answer:", "**Answer**:", "Final answer (in cm):", also with a full-width colon
_COLON = r"(?<![a-zA-Z])answers?(?![a-zA-Z])[^\n:.：]{0,40}[:：]"
_IS = r"(?<![a-zA-Z])answers?(?![a-zA-Z])[^\n:.：]{0,60}?(?:\b(?:is|are|equals)\b|=)\s*[:：]?"
_LINE_START = r"^[#>*_ \t]*"
_HEADING = _LINE_START + r"(?:the\s+)?(?:final\s+|my\s+)?answer[*_ \t]*$"
# "Ans. 73", "Ans: 73": not "ans = 0" of a program
_SHORT = _LINE_START + r"ans(?:\.[*_ \t]*[:：]?(?=[ \t*_])|[*_ \t]*[:：])"
_PHRASES = tuple(
    re.compile(each, re.IGNORECASE | re.MULTILINE) for each in (_COLON, _IS, _HEADING, _SHORT)
)
_LINES = (
    re.compile(
        _LINE_START + r"(?:final\s+)?(?:answer|ans\.?)[*_ \t]*[:：]", re.IGNORECASE | re.MULTILINE
    ),
)
# "A: 73" at the end, as in GSM8K's published solutions. Beside a "B:" or "(C)" it is one of several
# choices or names, and after a "Q:" it answers a question that the response asks itself
_LETTER = re.compile(_LINE_START + r"A[*_ \t]*[:：](?=\s*[^\n]*\s*\Z)", re.MULTILINE)
_OTHERS = re.compile(_LINE_START + r"(?:\(?[B-Z][*_ \t]*[):：]|[Qq]uestion\b)", re.MULTILINE)
_MARKUP = re.compile(r"[\s*_`\"'“”>#]*")
# of a list, on a line of its own; a tag such as </answer> or <|im_end|> ends an answer
_BULLET = re.compile(r"(?:[-•]\s+|\d+\.\s+(?=\S))?")
_TAG = re.compile(r"<[/|][^<>\n]{0,40}>")
_DISPLAY = (("$$", "$$"), ("\\[", "\\]"))
_ENVIRONMENT = re.compile(r"\$*\\begin\{(\w+\*?)\}")
# The full stop of a sentence: not a decimal point, not that of "\right.".
_SENTENCE_END = re.compile(r"(?<!\\right)(?<!\\left)[.!?](?=[\s*_`\"'”)]|$)")


class Candidate(NamedTuple):
    """A final answer: one text, or those of joined boxes; and whether words go on behind it."""

    texts: tuple[str, ...]
    in_words: bool


def candidates(text: str, order: str = "math") -> Iterator[Candidate]:
    r"""Final answers of a text, the likeliest first.

    Where a box is opened and no answer stands in it (nothing, or it is never closed) the text
    commits to none, and nothing further is looked for.

    Args:
        text: of a response, or of a reference.
        order: of ``ORDERS``.
    """
    for where in ORDERS[order]:
        if where == BOX and has_box(text):
            boxed = last_boxes(text)
            if len(boxed) > 1:
                yield Candidate(boxed[-1:], False)
            if boxed:
                yield Candidate(boxed, False)
            return
        if where == HASH:
            found = _hash_lines(text)
        elif where == PHRASE:
            letter = () if _OTHERS.search(text) else (_LETTER,)
            found = _phrases(text[-_WINDOW_CHARS:], _PHRASES + letter)
        elif where == LINE:
            found = _phrases(text[-_WINDOW_CHARS:], _LINES)
        else:
            continue
        yield from (Candidate((each,), True) for each in found)


def _hash_lines(text: str) -> Iterator[str]:
    for match in list(_HASH.finditer(text))[: -_MAX_PLACES - 1 : -1]:
        found = _value(text, match.end(), whole_line=True)
        if found:
            yield found


def _phrases(text: str, patterns: tuple[re.Pattern[str], ...]) -> Iterator[str]:
    ends = {match.end() for pattern in patterns for match in pattern.finditer(text)}
    for end in sorted(ends, reverse=True)[:_MAX_PLACES]:
        found = _value(text, end)
        if found:
            yield found


def _value(text: str, position: int, whole_line: bool = False) -> str:
    """The answer that begins at ``position`` or on the next line that is not empty."""
    begin, position = position, _MARKUP.match(text, position).end()
    if "\n" in text[begin:position]:
        position = _BULLET.match(text, position).end()
    for opening, closing in _DISPLAY:
        if text.startswith(opening, position):
            inside = text[position + len(opening) :].partition(closing)[0]
            return inside.strip()
    environment = _ENVIRONMENT.match(text, position)
    if environment:
        closing = f"\\end{{{environment.group(1)}}}"
        inside, closed, _ = text[position:].partition(closing)
        return (inside + closed).strip()
    line = _TAG.split(text[position:].split("\n", 1)[0], maxsplit=1)[0]
    end = None if whole_line else _SENTENCE_END.search(line)
    return (line[: end.start()] if end else line).strip()
