r"""The forms in which the same answer is typed, brought to one: LaTeX without its decoration."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"
_SUPERSCRIPT = re.compile(f"[{_SUPERSCRIPTS}]+")
_TO_DIGITS = str.maketrans(_SUPERSCRIPTS, "0123456789-+")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_SUBSCRIPT = re.compile("[₀-₉]+")
_FROM_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_ROOT_SIGN = re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z]|\([^()]*\)|\{[^{}]*\})")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*",
    "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "√": r"\sqrt ", "°": r"^\circ ", "∅": r"\emptyset ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "≈": r"\approx ", "⁄": "/", "′": "'",
    "“": '"', "”": '"', "’": "'", "\u200b": "",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_NOTHING = re.compile(r"(?<!\\)\\!\s*|\{\}")
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|\\hspace\{[^}]*\}|~|(?<!\\)\\(?=\s)")
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|mathopen|mathclose)"
    r"(?![a-zA-Z])\.?"
)


def _base(match: re.Match[str]) -> str:
    return f"_{{{match[1] or match[2]}}}"


# of a group in braces, with groups in it
_INNER = r"((?:[^{}]|\{[^{}]*\})*)"
# "\text{km}", which other commands for upright text become
TEXT = re.compile(rf"\\text\s*\{{{_INNER}\}}")
_SAME = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\(?:leqslant|leq)(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq)(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![a-zA-Z])"), "|"),
    (
        re.compile(r"\\(?:lbrace|rbrace)(?![a-zA-Z])"),
        lambda m: r"\{" if m.group()[2] == "b" else r"\}",
    ),
    (re.compile(r"\\operatorname\*?\s*\{\s*([a-zA-Z]+)\s*\}"), r"\\\1 "),
    (re.compile(r"\\(?:mathrm|text|rm)\s*\{\s*([ei])\s*\}"), r"\1 "),
    (re.compile(rf"\\(?:mathbf|boldsymbol|mathit|bm|underline)\s*\{{{_INNER}\}}"), r"{\1}"),
    (re.compile(rf"\\(?:textcolor|color)\s*\{{\w+\}}\s*\{{{_INNER}\}}"), r"{\1}"),
    (re.compile(r"\\\\\s*\[[\d.]+\s*\w+\]"), r"\\\\"),
    (re.compile(r"\{:\}"), ":"),
    (re.compile(r"\\text\s*\{\s*\\?\$\s*\}|\bUS\s*\\?\$"), r"\\$"),
    (re.compile(r"(?<=\d)\s*\^?\s*\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?"), ""),
    (
        re.compile(r"\\(?:textbf|textit|textrm|textnormal|mbox|mathrm|mathsf|rm)(?![a-zA-Z])"),
        r"\\text",
    ),
    (re.compile(r"\\(?:varnothing)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\(?:ldots|dots|cdots)(?![a-zA-Z])"), "..."),
    (re.compile(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)"), ","),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])"), r"\\degree "),
    (re.compile(r"\\degree\s*\\text\s*\{\s*([CF])\s*\}"), r"\\degree \1"),
    (re.compile(r"_\s*\{\s*\\text\s*\{\s*([a-zA-Z]+)\s*\}\s*\}"), r"_{\1}"),
    (re.compile(r"\\text\s*\{\s*\(?base\s+(\w+)\)?\s*\}|\(?\bbase\s+(\w+)\)?"), _base),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_ENDS = re.compile(r"^[\s*_`,;:\"]+|[\s*_`,;\"]+$")
_BOLD = re.compile(r"(?<!\S)\*\*(?=\S)|(?<=\S)\*\*(?![^\s.,;:!?)])")
_FULL_STOP = re.compile(r"\s*(?<!\\right)(?<!\.)\.$")


def normalize(text: str) -> str:
    """The answer in a form of few: no markup, delimiters, spacing commands or look-alikes.

    Commands of one meaning become one; text in other scripts' digits and full-width signs become
    ASCII. Units, currency and braces stay.
    """
    text = _unicode_forms(text)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match.group().translate(_TO_DIGITS)}}}", text)
    # NFKC makes some of these signs out of others
    text = _spelled_out(unicodedata.normalize("NFKC", _spelled_out(text)))
    text = _SPACES.sub(" ", _NOTHING.sub("", text))
    text = _undecorated(_BOLD.sub("", text))
    text = _DROPPED.sub("", text)
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _unicode_forms(text: str) -> str:
    """Characters that would lose their meaning as their look-alikes: ½, ₂, √ with what it spans."""
    for char, fraction in _VULGAR.items():
        text = text.replace(char, f" {fraction} ")
    text = _SUBSCRIPT.sub(lambda m: f"_{{{m.group().translate(_FROM_SUBSCRIPTS)}}}", text)
    return _ROOT_SIGN.sub(lambda m: f"\\sqrt{{{m[1].strip('(){}')}}}", text)


def _spelled_out(text: str) -> str:
    return _SYMBOL.sub(lambda match: _SYMBOLS[match.group()], text)


def _undecorated(text: str) -> str:
    """Without what Markdown, LaTeX and prose put around an answer."""
    previous = None
    while previous != text:
        previous = text
        text = _FULL_STOP.sub("", _ENDS.sub("", text))
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if inner and text == opening + inner + closing and closing not in inner:
                text = inner
                break
    # several formulas in one sentence; a dollar before a number stays, as a unit
    return re.sub(r"(?<!\\)\$(?![\d.])|(?<=[\d\s}a-zA-Z)])(?<!\\)\$|\\[()]", " ", text)
