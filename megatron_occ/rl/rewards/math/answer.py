r"""A reader of answers: numbers, expressions, words, and several of these together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from megatron_occ.rl.rewards.math.expression import FUNCTIONS, NotAnExpression, parse_expression
from megatron_occ.rl.rewards.math.forms import Answer, Group, Leaf, Relation
from megatron_occ.rl.rewards.math.normalize import TEXT, normalize
from megatron_occ.rl.rewards.math.number import parse_plain
from megatron_occ.rl.rewards.math.units import split_magnitude, split_unit

# Entries of a list: more is a runaway generation.
MAX_PARTS = 100
_MAX_NESTING = 8

_OPENING, _CLOSING = ("(", "[", "{", "\\{", "\\langle"), (")", "]", "}", "\\}", "\\rangle")
_PIECE = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\lt": "<", "\\gt": ">", "\\le": "<=", "\\ge": ">=",
    "\\ne": "!=", "\\in": "in", "\\approx": "~",
}  # fmt: skip
_CONJUNCTION = re.compile(
    r"\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])"
)
_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{(?:[pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{[a-zA-Z]+\}\s*[\])]?"
)
_LEADING = re.compile(
    r"\A(?:approximately|about|exactly|only|just|simply|equal to|a total of|the number|option|"
    r"choice|therefore|thus|hence)\b[:,]?\s*",
    re.IGNORECASE,
)
# The name of what is computed: "x", "f(-1)", "f^{-1}(3)", "S_{n+1}", "AB", "\angle ABC", "|z|",
# "[ABC]", "\overline{AB}", "\mathbf{v}", "P(X > 2)", "(x, y)", "Area", "A^{-1}"
_INDEX = r"(?:\s*_\s*(?:\{[^{}]*\}|\w))?"
_NAME = re.compile(
    rf"m?\s*\\angle\s*\w+|\|[^|]{{1,20}}\||\[[A-Z]{{3,}}\]|\\overline\s*\{{\w+\}}|\{{[a-zA-Z]\}}{_INDEX}"
    rf"|\(\s*[a-zA-Z]{_INDEX}(?:\s*,\s*[a-zA-Z]{_INDEX})+\s*\)"
    rf"|(?:\\?[a-zA-Z]+|\\text\s*\{{[^{{}}]*\}}){_INDEX}\s*'*(?:\s*\^\s*\{{-1\}})?(?:\s*\([^()]{{0,40}}\))?"
)
_WORD = re.compile(r"(?<![a-zA-Z\\])(?:[a-zA-Z]{3,}|[nN]o|NO)(?![a-zA-Z])")
_OPERATOR = re.compile(r"[+*/^=<>|!_]|\\(?!text)[a-zA-Z]")
# "100,200,300": a number, or three
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+")
# "34 apples are left": no second number in what follows
_COUNTED = re.compile(
    r"([-+]?\\?\$?\d[\d,.]*)\s+(?!(?:is|or|not|to|than|times|and|out|of|in)\b)[a-zA-Z][^\d+*/=^\\]*$"
)
# "5 (five)"
_PARENTHESIS = re.compile(r"\s+\((?=[a-zA-Z\s]{3,}\)$)(?!or\b|mod\b)")
_KNOWN_WORDS = frozenset((*FUNCTIONS, "infty", "binom", "frac"))
_CLAUSE = re.compile(
    r"\s*[,;(]?\s*(?<![a-zA-Z])(?:since|because|as|so|which|where|when|given|if|that|with|but|for)"
    r"(?![a-zA-Z])|,\s+(?!and\b|or\b)(?=[a-zA-Z]{2,})|;\s+(?=[a-zA-Z])|\s\(",
    re.IGNORECASE,
)


def read_answers(texts: tuple[str, ...], *, in_words: bool = False) -> Iterator[Answer]:
    """Readings of one answer, or of those of joined boxes.

    Args:
        texts: as they stand.
        in_words: the answer is part of a sentence: "73, since 70 + 3 is 73" is read as a list first
            and as 73 then, "34 apples are left" as 34.
    """
    if len(texts) > 1:
        yield Group("list", tuple(_read(normalize(text)) for text in texts[:MAX_PARTS]))
        return
    whole = _LEADING.sub("", _untexted(normalize(texts[0])))
    yield _read(whole)
    if _GROUPED.fullmatch(whole):
        yield _flat("list", [_read(part) for part in whole.split(",")])
    clause = _CLAUSE.search(whole) if in_words else _PARENTHESIS.search(whole)
    if clause and clause.start():
        yield _read(whole[: clause.start()].strip(" ,;."))
    counted = _COUNTED.match(whole) if in_words else None
    if counted:
        yield _read(counted[1])


def _read(text: str, nesting: int = 0) -> Answer:
    """The answer that a normalized text is."""
    text = _untexted(text.strip())
    if nesting > _MAX_NESTING:
        return Leaf(text)
    plain = parse_plain(text)
    if plain is not None:
        return Leaf(text, plain, ("num", plain.value))
    for reader in (_matrix, _list, _relation, _union, _bracketed, _plus_minus):
        found = reader(text, nesting + 1)
        if found is not None:
            return found
    return _leaf(text)


def _untexted(text: str) -> str:
    """Without ``\\text{}`` around the whole."""
    match = TEXT.fullmatch(text)
    return match[1].strip() if match else text


def _pieces(text: str) -> Iterator[tuple[str, int, int]]:
    """Commands and characters, each with its place and how many brackets are open around it."""
    depth = 0
    for match in _PIECE.finditer(text):
        piece = match.group()
        depth -= piece in _CLOSING
        yield piece, match.start(), depth
        depth += piece in _OPENING


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    parts, start = [], 0
    for piece, position, depth in _pieces(text):
        if depth == 0 and piece in separators:
            parts.append(text[start:position])
            start = position + len(piece)
    return [*parts, text[start:]]


def _list(text: str, nesting: int) -> Answer | None:
    text = _CONJUNCTION.sub(" , ", text)
    parts = [part.strip() for part in _split(_shielded(text), (",", ";"))]
    parts = [part for part in parts if part]
    if not 1 < len(parts) <= MAX_PARTS:
        return None
    return _flat("list", [_read(part.replace("\0", ","), nesting) for part in parts])


def _shielded(text: str) -> str:
    """Commas that group digits do not separate: those without a space after them."""
    return re.sub(
        r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m[0].replace(",", "\0"), text
    )


def _flat(kind: str, items: list[Answer]) -> Group:
    flat = [
        inner
        for item in items
        for inner in (item.items if isinstance(item, Group) and item.kind == "list" else (item,))
    ]
    return Group(kind, tuple(flat))


def _union(text: str, nesting: int) -> Answer | None:
    parts = _split(text, ("\\cup",))
    if len(parts) < 2:
        return None
    items = [_read(part, nesting) for part in parts[:MAX_PARTS]]
    if all(isinstance(item, Group) and item.kind == "set" for item in items):
        return Group("set", tuple(dict.fromkeys(entry for item in items for entry in item.items)))
    return Group("union", tuple(items))


def _matrix(text: str, nesting: int) -> Answer | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row.split("&") for row in match[1].split("\\\\") if row.strip()]
    if not rows or len(rows) * len(rows[0]) > MAX_PARTS:
        return None
    items = tuple(_read(entry, nesting) for row in rows for entry in row)
    return Group("matrix", items, shape=tuple(len(row) for row in rows))


def _bracketed(text: str, nesting: int) -> Answer | None:
    """A tuple, an interval or a set: brackets around the whole."""
    pieces = [(piece, position) for piece, position, depth in _pieces(text) if depth == 0]
    opens = pieces and pieces[0][0] in _OPENING and pieces[-1][0] in _CLOSING
    if not opens or sum(piece in _OPENING for piece, _ in pieces) != 1:
        return None
    opening, closing = pieces[0][0], pieces[-1][0]
    inner = text[len(opening) : pieces[-1][1]]
    parts = _split(inner, (",", ";"))
    is_set = opening in ("\\{", "{")
    if len(parts) == 1 and opening != "\\{":
        return None if opening == "[" else _read(inner, nesting)
    items = [_read(part, nesting) for part in parts[:MAX_PARTS]]
    if is_set:
        return _flat("set", items)
    brackets = (opening + closing).replace("\\langle", "(").replace("\\rangle", ")")
    return Group("tuple", tuple(items), brackets)


def _relation(text: str, nesting: int) -> Answer | None:
    parts, signs, start = [], [], 0
    for piece, position, depth in _pieces(text):
        if depth == 0 and piece in _RELATIONS:
            parts.append(text[start:position].strip())
            signs.append(_RELATIONS[piece])
            start = position + len(piece)
    if not signs:
        return None
    parts.append(text[start:].strip())
    if not all(parts[1:]) or len(parts) > MAX_PARTS:
        return None
    return _relation_of(parts, signs, nesting)


def _relation_of(parts: list[str], signs: list[str], nesting: int) -> Answer | None:
    return _assignment(parts, signs, nesting) or _chain(parts, signs, nesting)


def _assignment(parts: list[str], signs: list[str], nesting: int) -> Answer | None:
    """What ``x = ... = 3``, ``x \\in (1, 2)`` or ``\\sqrt{2} \\approx 1.41`` says."""
    if not parts[0]:  # "= 73", "\\approx 73"
        return _read(parts[1], nesting) if len(parts) == 2 and signs[0] in "=~" else None
    if signs[-1] == "~" and not _NAME.fullmatch(parts[-2]):
        if len(parts) == 2:
            return _read(parts[0], nesting)
        return _relation_of(parts[:-1], signs[:-1], nesting)
    if not set(signs) <= {"=", "in", "~"}:
        return None
    named = _NAME.fullmatch(parts[0]) is not None
    if not named and any(_letters(part) for part in parts):
        return None
    value = _read(parts[-1], nesting)
    if named and isinstance(value, Leaf) and not value.name:
        return replace(value, name="".join(parts[0].split()))
    return value


def _letters(text: str) -> bool:
    return re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", text) is not None


def _chain(parts: list[str], signs: list[str], nesting: int) -> Answer | None:
    leaves = [_read(part, nesting) for part in parts]
    if (
        not parts[0]
        or not all(isinstance(leaf, Leaf) for leaf in leaves)
        or not set(signs).isdisjoint(("in", "~"))
    ):
        return None
    relations = []
    for left, sign, right in zip(leaves, signs, leaves[1:], strict=False):
        turned = sign in (">", ">=")
        first, second = (right, left) if turned else (left, right)
        relations.append(Relation(sign.replace(">", "<"), first, second))
    return relations[0] if len(relations) == 1 else Group("chain", tuple(relations))


def _plus_minus(text: str, nesting: int) -> Answer | None:
    if text.count("\\pm") + text.count("\\mp") != 1:
        return None
    sign = "\\pm" if "\\pm" in text else "\\mp"
    return _flat("list", [_read(text.replace(sign, each), nesting) for each in "+-"])


def _leaf(text: str) -> Leaf:
    number, unit = split_unit(text)
    plain = parse_plain(number)
    if plain is not None:
        factor, unit = split_magnitude(unit)
        plain = replace(plain, value=plain.value * factor)
        return Leaf(number if factor == 1 else "", plain, ("num", plain.value), unit)
    unwrapped = TEXT.sub(r" \1 ", text).strip()
    if _is_words(unwrapped):
        return Leaf(unwrapped)
    try:
        return Leaf(number, None, parse_expression(number), unit)
    except (NotAnExpression, RecursionError):
        return Leaf(unwrapped)


def _is_words(text: str) -> bool:
    """Whether a word stands in it, set off by itself: not "3xyz", "sin x", "abc/(4R)"."""
    if _OPERATOR.search(text):
        return False
    return any(
        match.group().lower() not in _KNOWN_WORDS and not re.match(r"[\d^_({]", text[match.end() :])
        and not re.search(r"[\d)}]$", text[: match.start()])
        for match in _WORD.finditer(text)
    )  # fmt: skip
