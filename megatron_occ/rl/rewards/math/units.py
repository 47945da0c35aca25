r"""Units behind (or a currency before) an answer."""

from __future__ import annotations

import re

from megatron_occ.rl.rewards.math.normalize import TEXT

_SAME = {
    "m": "meter metre", "km": "kilometer kilometre", "cm": "centimeter centimetre",
    "mm": "millimeter millimetre", "ft": "foot feet", "in": "inch inches", "mi": "mile",
    "yd": "yard", "h": "hour hr", "min": "minute", "s": "second sec", "d": "day", "g": "gram",
    "kg": "kilogram kilo", "mg": "milligram", "lb": "pound", "oz": "ounce", "l": "liter litre",
    "ml": "milliliter millilitre", "dollar": "$ usd buck", "cent": "¢", "euro": "€ eur",
    "rupee": "₹ rs", "yen": "¥", "degree": "deg \\degree", "%": "percent percentage pct",
    "mph": "mi/h", "km/h": "kmh kph", "rad": "radian", "n": "newton", "j": "joule", "w": "watt",
    "v": "volt", "hz": "hertz", "k": "kelvin", "mol": "mole", "week": "wk", "year": "yr",
    "sterling": "£ gbp",
}  # fmt: skip
_MAGNITUDES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_CANONICAL = {name: unit for unit, text in _SAME.items() for name in text.split()}
_KNOWN = frozenset(_SAME)
_NAMED = frozenset(name for name in (*_SAME, *_CANONICAL) if len(name) > 1)
# units of one letter, where a space sets them off
_LETTERS = frozenset("msghLNJWVKCF")
_CURRENCY = re.compile(r"^([+-]?)\s*(?:\\?(\$)|([€£₹¥]))\s*(?=[\d.+-])|^Rs\.?\s*(?=\d)")
_EXPONENT = r"(?:\s*\^\s*(?:\{-?\d\}|-?\d))?"
# "7\text{ km}", "7\text{ m}/\text{s}^2"
_TEXT = TEXT.pattern
_TEXT_UNIT = re.compile(
    rf"(?P<unit>(?:\\mu\s*)?{_TEXT}{_EXPONENT}(?:\s*(?:/|\\cdot)?\s*{_TEXT}{_EXPONENT})*)[\s.]*$"
)
_SIGN = re.compile(r"(?P<sign>\\?%|\\?\$|[¢€£]|\\degree)\s*(?P<scale>[CF]?)$")
_FUNCTION = re.compile(r"\\(?!frac|pi|sqrt|cdot|times)[a-zA-Z]|[a-zA-Z](?<!\\frac)(?<!\\pi)\(")
_TENS = r"(?:\s*(?:\\times|\\cdot|x|\*)\s*10\s*\^\s*(?:\{[+-]?\d+\}|[+-]?\d+))?"
_NUMBER = re.compile(
    rf"[-+]?(?:[\d.,/ ]*\d\.?{_TENS}|\d*\s*\\frac\s*\{{\d+\}}\s*\{{\d+\}}|\d*\s*\\pi)\s*"
)
_WORD = rf"(?:\\mu\s*)?[a-zA-Zµ]+\.?{_EXPONENT}"
_WORDS = re.compile(rf"{_WORD}(?:(?:\s*/\s*|\s+|-){_WORD})*")
# Words behind a number that are no unit of it
_NO_UNIT = frozenset(
    (
        *("and", "or", "not", "is", "are", "was", "times", "over", "than", "to", "base", "mod"),
        *("plus", "minus", "e", "i", "x", "squared", "cubed", "half", "halves", "thirds"),
        *("fourths", "quarters", "fifths", "sixths", "tenths", "hundredths", "dozen", "pairs"),
    )
)
_MAX_WORDS = 8


def split_unit(text: str) -> tuple[str, str]:
    """A normalized text without its unit, and the unit in canonical form ("" without one).

    "7\\text{ km}", "73 clips", "$70,000", "50\\%" and "60\\degree" have one.
    """
    text, currency = _currency(text)
    sign = _SIGN.search(text)
    if sign and _takes_sign(text[: sign.start()]):
        unit = sign["sign"].replace("\\%", "%").replace("\\$", "$") + sign["scale"]
        return text[: sign.start()].strip(), canonical_unit(unit)
    found = _TEXT_UNIT.search(text)
    if found and _is_unit(found["unit"]) and text[: found.start()].strip(" \\,"):
        return text[: found.start()].strip(), canonical_unit(_untexted(found["unit"]))
    number = _NUMBER.match(text)
    if number and _are_bare_words(text, number) and _WORDS.fullmatch(text, number.end()):
        return number.group().strip(), canonical_unit(text[number.end() :])
    return text, currency


def _takes_sign(text: str) -> bool:
    """Whether a degree sign behind it is a unit: not that of "\\tan 80\\degree"."""
    is_of_a_function = _FUNCTION.search(text) is not None
    return not is_of_a_function and re.search(r"[\d)}.a-zA-Z]\s*$", text) is not None


def _are_bare_words(text: str, number: re.Match[str]) -> bool:
    """Whether what follows a number is a unit and not factors: "7 km", "73 clips", not "4ab"."""
    words = text[number.end() :]
    if not _is_unit(words):
        return False
    first = re.match(r"[a-zA-Z]+", words)
    name = first.group() if first else ""
    if number.group()[-1:].isspace():
        return len(name) > 2 or name.lower() in _NAMED or name in _LETTERS
    return len(name) > 1 and name.lower() in _NAMED


def _currency(text: str) -> tuple[str, str]:
    match = _CURRENCY.match(text)
    if match is None:
        return text, ""
    symbol = match[2] or match[3] or "rs"
    return f"{match[1] or ''}{text[match.end() :]}", canonical_unit(symbol)


def _is_unit(text: str) -> bool:
    words = re.findall(r"(?<!\\)[a-zA-Z]+", text.lower())
    return 0 < len(words) <= _MAX_WORDS and _NO_UNIT.isdisjoint(words)


def _untexted(text: str) -> str:
    return TEXT.sub(r"\1", text).replace("\\cdot", " ")


def canonical_unit(text: str) -> str:
    """One spelling of a unit: "square meters" and "m^2" are "m^2", "clips" is "clip"."""
    text = re.sub(r"[{}\s.]+", " ", text.replace("\\", " ")).strip()
    text = re.sub(r"\s*\^\s*", "^", text)
    text = re.sub(r"\s*/\s*|\s+per\s+", "/", text)
    text = re.sub(r"\s([a-zA-Z]+)\^-(\d)", _under, text)
    return "/".join(_one(part) for part in text.split("/"))


def _under(match: re.Match[str]) -> str:
    """ "m s^-1" is "m/s"."""
    return f"/{match[1]}" + (f"^{match[2]}" if match[2] != "1" else "")


def _one(text: str) -> str:
    power = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
    words = text.split()
    exponent = power[words[0].lower()] if len(words) > 1 and words[0].lower() in power else ""
    if exponent:
        words = words[1:]
    return " ".join(_word(word) for word in words) + exponent


def _word(text: str) -> str:
    base, caret, exponent = text.partition("^")
    base = base.lower()
    for name in (base, base.removesuffix("s"), base.removesuffix("es")):
        if name in _CANONICAL or name in _KNOWN:
            base = _CANONICAL.get(name, name)
            break
    else:
        base = base.removesuffix("s")
    return f"{base}{caret}{exponent}"


def split_magnitude(unit: str) -> tuple[int, str]:
    """The factor that a canonical unit begins with, and the rest: "million dollar"."""
    first, _, rest = unit.partition(" ")
    factor = _MAGNITUDES.get(first)
    return (1, unit) if factor is None else (factor, rest)


def same_unit(first: str, second: str) -> bool:
    """Whether two units may be the same: equal, one missing, or one the other's last words."""
    if not first or not second or first == second:
        return True
    return first.endswith(f" {second}") or second.endswith(f" {first}")
