r"""A reader of mathematical expressions, LaTeX or plain, into trees: nothing is evaluated.

Written here and not taken from a library: what a policy in training writes is hostile input. The
grammars at hand evaluate as they read (binomials, Python through ``eval``), take seconds for twenty
nested parentheses, or read "2 3" as 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

MAX_TOKENS = 400
MAX_DEPTH = 40

Tree = tuple

_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta"),
    *("vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon"),
    *("phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi"),
    *("Sigma", "Phi", "Psi", "Omega", "ell"),
)
TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
FUNCTIONS = (
    *TRIGONOMETRIC,
    *(f"arc{name}" for name in ("sin", "cos", "tan")),
    *("sinh", "cosh", "tanh", "log", "ln", "lg", "exp", "sqrt"),
)
_NAMES = sorted((*FUNCTIONS, *_GREEK, "pi", "infty", "binom", "frac"), key=len, reverse=True)
_COMMANDS = frozenset(_NAMES)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"|\\(?P<command>[a-zA-Z]+|[{}|])"
    rf"|(?P<name>{'|'.join(_NAMES)})"
    r"|(?P<letter>[a-zA-Z]'*)"
    r"|(?P<sign>[-+*/^!()\[\]{}|_%]))"
)
_BRACKETS = {"(": ")", "[": "]", "{": "}", "lfloor": "rfloor", "lceil": "rceil", "\\{": "\\}"}
_TIMES = {"*", "cdot", "times"}
_OVER = {"/", "div"}
_CONSTANTS = {"pi": ("const", "pi"), "infty": ("const", "oo")}


class NotAnExpression(ValueError):
    """The text is no expression that this reader knows."""


def parse_expression(text: str) -> Tree:
    """The tree of a normalized text.

    Nodes are ``("num", Fraction)``, ``("sym", name)``, ``("const", "pi" | "e" | "i" | "oo")`` and
    ``(operation, *trees)`` with ``add mul div pow neg fact abs floor ceil root log binom`` or a
    function's name.

    Raises:
        NotAnExpression: see above, or it is longer or more deeply nested than an answer is.
    """
    reader = _Reader(_tokens(text))
    tree = reader.sum()
    reader.end()
    return tree


def _tokens(text: str) -> list[tuple[str, str]]:
    found = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or len(found) >= MAX_TOKENS:
            raise NotAnExpression(text[:80])
        found.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return found


class _Reader:
    """Recursive descent over tokens of (kind, text)."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens, self._at, self._depth = tokens, 0, 0

    def end(self) -> None:
        if self._at != len(self._tokens):
            raise NotAnExpression("more than an expression")

    def sum(self) -> Tree:
        return self._deeper(self._terms)

    def _deeper(self, read: Callable[[], Tree]) -> Tree:
        """Read a part that may hold parts of its own kind."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotAnExpression("too deep")
        tree = read()
        self._depth -= 1
        return tree

    def _terms(self) -> Tree:
        tree = self._product()
        while self._text in ("+", "-"):
            sign = self._take()
            term = self._product()
            tree = ("add", tree, ("neg", term) if sign == "-" else term)
        return tree

    @property
    def _kind(self) -> str | None:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else None

    @property
    def _text(self) -> str | None:
        if self._at >= len(self._tokens):
            return None
        kind, text = self._tokens[self._at]
        return f"\\{text}" if kind == "command" and text in "{}|" else text

    def _take(self) -> str:
        text = self._text
        if text is None:
            raise NotAnExpression("it ends early")
        self._at += 1
        return text

    def _expect(self, text: str) -> None:
        if self._take() != text:
            raise NotAnExpression(f"{text} is missing")

    def _product(self) -> Tree:
        tree = self._signed()
        while True:
            if self._text in _TIMES:
                self._take()
                tree = ("mul", tree, self._signed())
            elif self._text in _OVER:
                self._take()
                tree = ("div", tree, self._signed())
            elif self._starts_atom:
                tree = self._next_to(tree)
            else:
                return tree

    def _next_to(self, tree: Tree) -> Tree:
        """A factor without a sign before it; a fraction after an integer makes a mixed number."""
        mixed = tree[0] == "num" and tree[1].denominator == 1 and self._text == "frac"
        if self._kind == "number":
            raise NotAnExpression("a number after a factor")
        factor = self._power()
        return ("add" if mixed and _is_ratio(factor) else "mul", tree, factor)

    @property
    def _starts_atom(self) -> bool:
        if self._kind in ("number", "letter", "name"):
            return True
        if self._kind == "command":
            return self._text in _BRACKETS or self._text in _COMMANDS
        return self._text in ("(", "[", "{")

    def _signed(self) -> Tree:
        signs = 0
        while self._text in ("+", "-"):
            signs += self._take() == "-"
        tree = self._power()
        return ("neg", tree) if signs % 2 else tree

    def _power(self) -> Tree:
        tree = self._postfix()
        if self._text != "^":
            return tree
        self._take()
        return ("pow", tree, self._exponent())

    def _exponent(self) -> Tree:
        if self._text == "{":
            return self._bracketed()
        return self._deeper(self._signed)

    def _postfix(self) -> Tree:
        tree = self._atom()
        while self._text in ("!", "degree", "%"):
            operation = self._take()
            if operation == "!":
                tree = ("fact", tree)
            elif operation == "degree":
                tree = ("mul", tree, ("div", ("const", "pi"), _number(180)))
            else:
                tree = ("div", tree, _number(100))
        return tree

    def _atom(self) -> Tree:
        if self._kind == "number":
            return ("num", Fraction(self._take().replace(",", "")))
        if self._text in _BRACKETS:
            return self._bracketed()
        if self._text == "|":
            return self._absolute()
        if self._kind == "letter":
            return self._letter()
        if self._kind in ("command", "name"):
            return self._named(self._take())
        raise NotAnExpression(f"{self._text} where a number or symbol stands")

    def _bracketed(self) -> Tree:
        opening = self._take()
        tree = self.sum()
        self._expect(_BRACKETS[opening])
        operation = {"lfloor": "floor", "lceil": "ceil"}.get(opening)
        return (operation, tree) if operation else tree

    def _absolute(self) -> Tree:
        self._take()
        tree = self.sum()
        self._expect("|")
        return ("abs", tree)

    def _letter(self) -> Tree:
        name = self._take()
        if name in ("e", "i") and self._text != "_":
            return ("const", name)
        return ("sym", name + self._subscript())

    def _subscript(self) -> str:
        if self._text != "_":
            return ""
        self._take()
        if self._text != "{":
            return f"_{self._take()}"
        self._take()
        parts = []
        while self._text != "}":
            parts.append(self._take())
        self._take()
        return f"_{''.join(parts)}"

    def _named(self, name: str) -> Tree:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name == "frac":
            return ("div", self._argument(), self._argument())
        if name == "binom":
            return ("binom", self._argument(), self._argument())
        if name == "sqrt":
            return self._root()
        if name in FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return ("sym", name + self._subscript())
        raise NotAnExpression(f"\\{name}")

    def _argument(self) -> Tree:
        """Of a command: a group in braces, or one digit or symbol."""
        if self._text == "{":
            return self._bracketed()
        if self._kind != "number":
            return self._atom()
        digits = self._take().replace(",", "")
        if len(digits) > 1 and digits.isdigit():  # \frac12
            self._at -= 1
            self._tokens[self._at] = ("number", digits[1:])
        return ("num", Fraction(digits[0] if digits.isdigit() else digits))

    def _root(self) -> Tree:
        degree = _number(2)
        if self._text == "[":
            degree = self._bracketed()
        return ("root", self._argument(), degree)

    def _function(self, name: str) -> Tree:
        base = exponent = None
        if self._text == "_":
            self._take()
            base = self._argument()
        if self._text == "^":
            self._take()
            exponent = self._argument() if self._text == "{" else self._signed_number()
        tree = self._applied(name, base, self._function_argument())
        if exponent is None:
            return tree
        if exponent == ("neg", _number(1)) and name in TRIGONOMETRIC:
            return (f"arc{name}", *tree[1:])
        return ("pow", tree, exponent)

    def _signed_number(self) -> Tree:
        negative = self._text == "-" and bool(self._take())
        tree = self._argument()
        return ("neg", tree) if negative else tree

    def _applied(self, name: str, base: Tree | None, argument: Tree) -> Tree:
        if base is not None and name != "log":
            raise NotAnExpression(f"a base of {name}")
        if name in ("log", "ln", "lg"):
            implied = {"log": ("const", "e"), "ln": ("const", "e"), "lg": _number(10)}[name]
            return ("log", argument, base or implied)
        return (name, argument)

    def _function_argument(self) -> Tree:
        """In brackets, or the factors up to the next function or sign."""
        if self._text in ("(", "{", "["):
            return self._bracketed()
        tree = self._signed()
        while self._starts_atom and self._text not in FUNCTIONS and self._kind != "number":
            tree = ("mul", tree, self._power())
        return tree


def _number(value: int) -> Tree:
    return ("num", Fraction(value))


def _is_ratio(tree: Tree) -> bool:
    return tree[0] == "div" and all(part[0] == "num" for part in tree[1:])
