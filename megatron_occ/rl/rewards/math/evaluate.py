"""Values of expression trees: exact where they are rational, else to many digits."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from fractions import Fraction

import mpmath

from megatron_occ.rl.rewards.math.expression import TRIGONOMETRIC, Tree

# Bits of the exact numbers worked with, and digits to the left or right of the point.
MAX_BITS = 4_000
MAX_MAGNITUDE = 10_000
DIGITS = 60

_ARITHMETIC = {"add": operator.add, "mul": operator.mul, "neg": operator.neg, "abs": abs}
_ONE_ARGUMENT = {
    **{name: getattr(mpmath, name) for name in (*TRIGONOMETRIC, "exp", "sinh", "cosh", "tanh")},
    **{f"arc{name}": getattr(mpmath, f"a{name}") for name in TRIGONOMETRIC},
}


class NoValue(ValueError):
    """A value that is not defined, or so large that no answer means it."""


def exact_value(tree: Tree) -> Fraction | None:
    """The rational number that a tree is by arithmetic alone, None where it isn't one.

    Raises:
        NoValue: division by zero, or more than ``MAX_BITS``.
    """
    operation, *parts = tree
    if operation == "num":
        return parts[0]
    if operation in ("sym", "const"):
        return None
    values = [exact_value(part) for part in parts]
    if any(value is None for value in values):
        return None
    found = _exact(operation, values)
    if (
        found is not None
        and max(found.numerator.bit_length(), found.denominator.bit_length()) > MAX_BITS
    ):
        raise NoValue("too large")
    return found


def _exact(operation: str, values: list[Fraction]) -> Fraction | None:
    if operation in _ARITHMETIC:
        return _ARITHMETIC[operation](*values)
    first, *rest = values
    match operation:
        case "div":
            return first / _non_zero(rest[0])
        case "floor":
            return Fraction(math.floor(first))
        case "ceil":
            return Fraction(math.ceil(first))
        case "pow":
            return _exact_power(first, rest[0])
        case "root":
            return _exact_power(first, 1 / _non_zero(rest[0]))
        case "fact":
            return Fraction(math.factorial(_count(first)))
        case "binom":
            return Fraction(math.comb(_count(first), _count(rest[0])))
    return None


def _non_zero(value: Fraction) -> Fraction:
    if value == 0:
        raise NoValue("division by zero")
    return value


def _count(value: Fraction) -> int:
    if value.denominator != 1 or not 0 <= value <= MAX_BITS // 10:
        raise NoValue("too large, or no natural number")
    return int(value)


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MAX_BITS:
        raise NoValue("too large")
    if exponent.denominator != 1:
        root = _exact_root(base, exponent.denominator)
        return None if root is None else _exact_power(root, Fraction(exponent.numerator))
    if exponent < 0:
        _non_zero(base)
    return base ** int(exponent)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    if degree > MAX_BITS:
        return None
    if value < 0:
        root = _exact_root(-value, degree) if degree % 2 else None
        return None if root is None else -root
    parts = [_integer_root(part, degree) for part in (value.numerator, value.denominator)]
    return None if None in parts else Fraction(*parts)


def _integer_root(value: int, degree: int) -> int | None:
    if value < 2:
        return value
    if degree == 2:
        root = math.isqrt(value)
    else:
        root = _newton_root(value, degree)
    return root if root**degree == value else None


def _newton_root(value: int, degree: int) -> int:
    """Floor of a root, from above."""
    root = 1 << (value.bit_length() // degree + 1)
    while True:
        following = ((degree - 1) * root + value // root ** (degree - 1)) // degree
        if following >= root:
            return root
        root = following


def numeric_value(
    tree: Tree, symbols: Mapping[str, mpmath.mpc], digits: int = DIGITS
) -> mpmath.mpc:
    """The value of a tree to about so many digits.

    Raises:
        NoValue: undefined, infinite, or of more than ``MAX_MAGNITUDE`` digits.
    """
    with mpmath.workdps(digits):
        try:
            return _numeric(tree, symbols)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise NoValue(str(error)) from error


def _numeric(tree: Tree, symbols: Mapping[str, mpmath.mpc]) -> mpmath.mpc:
    operation, *parts = tree
    if operation == "num":
        return mpmath.mpf(parts[0].numerator) / parts[0].denominator
    if operation == "sym":
        return symbols[parts[0]]
    if operation == "const":
        return _constant(parts[0])
    values = [_numeric(part, symbols) for part in parts]
    return _checked(_apply(operation, values))


def _constant(name: str) -> mpmath.mpc:
    if name == "oo":
        raise NoValue("infinite")
    return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[name]


def _apply(operation: str, values: list[mpmath.mpc]) -> mpmath.mpc:
    if operation in _ARITHMETIC:
        return _ARITHMETIC[operation](*values)
    first, *rest = values
    match operation:
        case "div":
            return first / rest[0]
        case "floor":
            return mpmath.floor(first)
        case "ceil":
            return mpmath.ceil(first)
        case "pow":
            return _power(first, rest[0])
        case "root":
            return _root(first, rest[0])
        case "log":
            return mpmath.log(first) / mpmath.log(rest[0])
        case "fact":
            return mpmath.factorial(_bounded(first, 2000))
        case "binom":
            return mpmath.binomial(_bounded(first, 2000), _bounded(rest[0], 2000))
    return _ONE_ARGUMENT[operation](_bounded(first, 10**9))


def _power(base: mpmath.mpc, exponent: mpmath.mpc) -> mpmath.mpc:
    if base != 0 and abs(exponent) * abs(mpmath.log(abs(base)) or 0) > MAX_MAGNITUDE * 2.3:
        raise NoValue("too large")
    return base**exponent


def _root(value: mpmath.mpc, degree: mpmath.mpc) -> mpmath.mpc:
    """The real root where there is one."""
    if mpmath.im(value) == 0 and mpmath.re(value) < 0 and degree % 2 == 1:
        return -_power(-value, 1 / degree)
    return _power(value, 1 / degree)


def _bounded(value: mpmath.mpc, limit: int) -> mpmath.mpc:
    if abs(value) > limit:
        raise NoValue("too large")
    return value


def _checked(value: mpmath.mpc) -> mpmath.mpc:
    if not mpmath.isfinite(value):
        raise NoValue("not finite")
    if value != 0 and abs(mpmath.log10(abs(value))) > MAX_MAGNITUDE:
        raise NoValue("too large")
    return value


def names(tree: Tree) -> set[str]:
    """Symbols in a tree."""
    if tree[0] == "sym":
        return {tree[1]}
    if tree[0] in ("num", "const"):
        return set()
    return set().union(*(names(part) for part in tree[1:]))
