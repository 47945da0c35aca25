"""Plain numbers: what an answer is that has been worked out to its end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

# Digits of a number and size of a power of ten that are read: more is no answer.
MAX_DIGITS = 1000
# A decimal of this many significant digits may stand for a number that is none.
ROUNDED_DIGITS = 6

_DIGITS = r"\d{1,3}(?:(?:,| )\d{3})+(?!\d)|\d+"
_DECIMAL = rf"(?:(?:{_DIGITS})(?:\.\d*)?|\.\d+)"
_POWER = r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*(?P<tens>[+-]?\d+)\s*\}?"
_EXPONENT = r"[eE]\{?(?P<exponent>[+-]?\d+)\}?"
_SIGN = r"(?P<sign>[+-]?)\s*"
_SCIENTIFIC = re.compile(rf"{_SIGN}(?P<mantissa>{_DECIMAL})(?:{_POWER}|{_EXPONENT})?")
_TENS = re.compile(rf"{_SIGN}10\s*\^\s*\{{?\s*(?P<tens>[+-]?\d+)\s*\}}?")
_INTEGER = rf"(?:{_DIGITS})"
_FRACTION = re.compile(
    rf"{_SIGN}(?:(?P<whole>{_INTEGER})\s*)?\\frac\s*"
    rf"(?:\{{\s*(?P<top>[+-]?\s*{_INTEGER})\s*\}}|(?P<top1>\d))\s*"
    rf"(?:\{{\s*(?P<bottom>[+-]?\s*{_INTEGER})\s*\}}|(?P<bottom1>\d))"
)
_SLASH = re.compile(
    rf"{_SIGN}(?:(?P<whole>\d+)\s+)?(?P<top>{_INTEGER})\s*/\s*(?P<bottom>-?\s*{_INTEGER})"
)
_BASE = re.compile(r"(?P<digits>\d+)\s*_\s*\{?\s*(?:\\text\s*\{)?\s*(?P<base>\w+)[}\s]*")
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Plain:
    """A number as it is written.

    Args:
        value: exact.
        digits: significant digits of a decimal, None of an integer or a fraction.
        reduced: it is no fraction, or one in lowest terms that is no integer.
        base: that its digits are said to be in; the value is then that of the digits in base ten.
    """

    value: Fraction
    digits: int | None = None
    reduced: bool = True
    base: int | None = None

    def stands_for(self, value: Fraction) -> bool:
        """Whether this decimal is a fraction rounded to its digits, and has enough of them."""
        if self.digits is None or self.digits < ROUNDED_DIGITS or value.denominator == 1:
            return False
        return self.value == rounded(value, self.digits)


def rounded(value: Fraction, digits: int) -> Fraction:
    """``value`` to so many significant digits, half to even."""
    exponent = _magnitude(abs(value)) - digits + 1
    scale = Fraction(10) ** exponent
    return round(value / scale) * scale


def _magnitude(value: Fraction) -> int:
    """Floor of the logarithm to base ten of a positive number."""
    bits = value.numerator.bit_length() - value.denominator.bit_length()
    guess = int(bits * 0.30103)
    while Fraction(10) ** guess > value:
        guess -= 1
    while Fraction(10) ** (guess + 1) <= value:
        guess += 1
    return guess


def parse_plain(text: str) -> Plain | None:
    """The number that a normalized text is: integer, decimal, fraction, mixed, power of ten.

    None for anything else, whatever its value: "2^{10}" and "12*12" are sums to be done.
    """
    text = _unwrapped(text)
    if not text or len(text) > MAX_DIGITS or not any(char.isdigit() for char in text):
        return None
    return _scientific(text) or _fraction(text) or _based(text)


def _unwrapped(text: str) -> str:
    """Without parentheses or braces around the whole."""
    text = text.strip()
    while len(text) > 2 and (text[0], text[-1]) in (("(", ")"), ("{", "}")):
        inner = text[1:-1].strip()
        if any(char in inner for char in "(){},"):  # "(12,102)" is a point
            break
        text = inner
    return text


def _scientific(text: str) -> Plain | None:
    match = _TENS.fullmatch(text)
    mantissa = "1"
    if match is None:
        match = _SCIENTIFIC.fullmatch(text)
        if match is None:
            return None
        mantissa = match["mantissa"].replace(",", "").replace(" ", "")
    groups = match.groupdict()
    tens = int(groups.get("tens") or groups.get("exponent") or 0)
    if abs(tens) > MAX_DIGITS:
        return None
    value = Fraction(mantissa.removesuffix(".") or "0") * Fraction(10) ** tens
    decimal = "." in mantissa.removesuffix(".") or bool(tens)
    digits = len(mantissa.replace(".", "").lstrip("0")) if decimal else None
    return Plain(-value if match["sign"] == "-" else value, digits)


def _fraction(text: str) -> Plain | None:
    match = _FRACTION.fullmatch(text) or _SLASH.fullmatch(text)
    if match is None:
        return None
    groups = match.groupdict()
    top, bottom = (
        int(re.sub(r"[\s,]", "", groups[key] or groups[f"{key}1"])) for key in ("top", "bottom")
    )
    whole = int(re.sub(r"[\s,]", "", groups["whole"] or "0"))
    if bottom == 0 or (groups["whole"] and (top < 0 or bottom < 0)):
        return None
    value = whole + Fraction(top, bottom)
    reduced = gcd(top, bottom) == 1 and abs(bottom) != 1
    return Plain(-value if match["sign"] == "-" else value, reduced=reduced)


def _based(text: str) -> Plain | None:
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    base = _BASES.get(match["base"].lower()) or (
        int(match["base"]) if match["base"].isdigit() else 0
    )
    if not 2 <= base <= 36:
        return None
    return Plain(Fraction(int(match["digits"])), base=base)
