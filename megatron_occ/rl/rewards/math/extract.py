r"""Where the final answer of a response stands: boxes, a mark ``####``, or the word "answer"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

BOX, HASH, PHRASE, LINE = "box", "hash", "phrase", "line"
# What each order looks for, first to last. "line" is an ``Answer:`` of its own.
ORDERS = {"math": (BOX, HASH, PHRASE), "math_dapo": (LINE, BOX, HASH, PHRASE)}

# The word "answer" and what follows it are looked for in the end of a response only.
_WINDOW_CHARS = 2000
# Announcements that are looked at, and boxes that are one answer.
_MAX_PLACES = 50
# Between boxes that are one answer stands no more than this.
_JOIN_CHARS = 80

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_BARE_BOX = re.compile(r"[^\s$.,;\\]+")
_JOIN = re.compile(r"(?:[\s$&,;:~]|\\[()\[\]\\,;:! ]|\\q?quad|[A-Za-z]\w*\s*=|\b(?:and|or)\b)*")
_TEXT = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}")
_HASH = re.compile(r"#{4}(?!#)")
# "Answer:", "**Answer**:", "Final answer (in cm):", also with a full-width colon
_COLON = r"(?<![a-zA-Z])answers?(?![a-zA-Z])[^\n:.：]{0,40}[:：]"
_IS = r"(?<![a-zA-Z])answers?(?![a-zA-Z])[^\n:.：]{0,60}?(?:\b(?:is|are|equals)\b|=)\s*[:：]?"
_HEADING = r"^[#>*_ \t]*(?:the\s+)?(?:final\s+|my\s+)?answer[*_ \t]*$"
_PHRASES = tuple(re.compile(each, re.IGNORECASE | re.MULTILINE) for each in (_COLON, _IS, _HEADING))
_LINES = (re.compile(r"^[#>*_ \t]*(?:final\s+)?answer[*_ \t]*[:：]", re.IGNORECASE | re.MULTILINE),)
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
        if where == BOX and _BOX.search(text):
            boxed = _last_boxes(text)
            if len(boxed) > 1:
                yield Candidate(boxed[-1:], False)
            if boxed:
                yield Candidate(boxed, False)
            return
        if where == HASH:
            found = _hash_lines(text)
        elif where == PHRASE:
            found = _phrases(text[-_WINDOW_CHARS:], _PHRASES)
        elif where == LINE:
            found = _phrases(text[-_WINDOW_CHARS:], _LINES)
        else:
            continue
        yield from (Candidate((each,), True) for each in found)


def is_empty_box(text: str) -> bool:
    """Whether a text is a box that holds nothing."""
    match = _BOX.match(text.strip("$ "))
    return match is not None and not text.strip("$ ")[match.end() :].strip("{} ")


def final_box(text: str) -> str | None:
    """What the last box of a text holds, joined ones with commas; None without an answer in one."""
    boxed = _last_boxes(text) if _BOX.search(text) else ()
    return ", ".join(boxed) or None


def _last_boxes(text: str) -> tuple[str, ...]:
    """The last box, with those before it that are joined to it by no more than "and"."""
    boxes = []
    position = 0
    while match := _BOX.search(text, position):
        content, end = _content(text, match.end())
        if content is None:
            return ()
        boxes.append((match.start(), end, content))
        position = end
    group = [boxes[-1]]
    for box in boxes[-2 : -_MAX_PLACES - 2 : -1]:
        between = text[box[1] : group[0][0]]
        if len(between) > _JOIN_CHARS or "\n\n" in between or not _joins(between):
            break
        group.insert(0, box)
    contents = [_unboxed(content) for _, _, content in group]
    return tuple(dict.fromkeys(contents)) if contents[-1] else ()


def _joins(between: str) -> bool:
    return _JOIN.fullmatch(_TEXT.sub(r" \1 ", between)) is not None


def _content(text: str, start: int) -> tuple[str | None, int]:
    """What a box holds that opens at ``start``, None where it is not closed; and where it ends."""
    if text[start : start + 1] != "{":
        bare = _BARE_BOX.match(text, start)
        return (bare.group(), bare.end()) if bare else ("", start)
    inside = balanced(text, start + 1)
    return (None, len(text)) if inside is None else (inside, start + len(inside) + 2)


def _unboxed(content: str) -> str:
    """A box within the box is the answer."""
    match = _BOX.search(content)
    if match is None:
        return content.strip()
    inside, end = _content(content, match.end())
    return f"{content[: match.start()]}{inside or ''}{content[end:]}".strip()


def balanced(text: str, start: int) -> str | None:
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
