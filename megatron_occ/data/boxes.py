r"""Answers in LaTeX boxes: ``\boxed{...}`` and its kin."""

from __future__ import annotations

import re

# Boxes that are one answer, and characters between two of them.
_MAX_BOXES = 50
_JOIN_CHARS = 80

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_BARE_BOX = re.compile(r"[^\s$.,;\\]+")
_JOIN = re.compile(r"(?:[\s$&,;:~]|\\[()\[\]\\,;:! ]|\\q?quad|[A-Za-z]\w*\s*=|\b(?:and|or)\b)*")
_TEXT = re.compile(r"\\(?:text|mbox|textrm|mathrm)\s*\{([^{}]*)\}")


def has_box(text: str) -> bool:
    """Whether a box is opened in it."""
    return _BOX.search(text) is not None


def is_empty_box(text: str) -> bool:
    """Whether a text is a box that holds nothing."""
    match = _BOX.match(text.strip("$ "))
    return match is not None and not text.strip("$ ")[match.end() :].strip("{} ")


def final_box(text: str) -> str | None:
    """What the last box of a text holds, joined ones with commas; None without an answer in one."""
    boxed = last_boxes(text) if has_box(text) else ()
    return ", ".join(boxed) or None


def last_boxes(text: str) -> tuple[str, ...]:
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
    for box in boxes[-2 : -_MAX_BOXES - 2 : -1]:
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
