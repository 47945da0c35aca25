"""Whether expressions have the same value: exact, or at points to many digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import mpmath

from megatron_occ.rl.rewards.math.evaluate import (
    DIGITS,
    NoValue,
    exact_value,
    names,
    numeric_value,
)
from megatron_occ.rl.rewards.math.expression import Tree
from megatron_occ.rl.rewards.math.number import Plain

# Where expressions are compared: no zeros, no special values, both signs.
_POINTS = (
    Fraction(7919, 5003),
    Fraction(-6271, 4001),
    Fraction(3571, 5227),
    Fraction(-2903, 7001),
    Fraction(9173, 3001),
)
_ENOUGH_POINTS = 2
_AGREE = mpmath.mpf(10) ** -30


def trees_equal(gold: Tree, found: Tree) -> bool:
    """Whether two expressions have the same values, at random points where they have symbols."""
    if gold == found:
        return True
    if _is_infinite(gold) or _is_infinite(found):
        return _sign_of_infinity(gold) == _sign_of_infinity(found) != 0
    symbols = sorted(names(gold) | names(found))
    if not symbols:
        return _numbers_equal(gold, found)
    agreed = 0
    for point in range(len(_POINTS)):
        values = _at(gold, found, symbols, point, DIGITS)
        if values is None:
            continue
        if not _close(*values) and not _both_vanish(gold, found, symbols, point):
            return False
        agreed += 1
    return agreed >= _ENOUGH_POINTS


def _numbers_equal(gold: Tree, found: Tree) -> bool:
    exact = known_value(gold), known_value(found)
    if None not in exact:
        return exact[0] == exact[1]
    values = _at(gold, found, [], 0, DIGITS)
    return values is not None and (_close(*values) or _both_vanish(gold, found, [], 0))


def _at(
    gold: Tree, found: Tree, symbols: Sequence[str], point: int, digits: int
) -> tuple[mpmath.mpc, mpmath.mpc] | None:
    places = {}
    for number, name in enumerate(symbols):
        place = _POINTS[(point + number) % len(_POINTS)] + Fraction(number, 7)
        with mpmath.workdps(digits):
            places[name] = mpmath.mpf(place.numerator) / place.denominator
    try:
        return numeric_value(gold, places, digits), numeric_value(found, places, digits)
    except NoValue:
        return None


def _close(first: mpmath.mpc, second: mpmath.mpc) -> bool:
    """Relative: numbers may be as small as they like."""
    with mpmath.workdps(DIGITS):
        return abs(first - second) <= _AGREE * max(abs(first), abs(second))


def _both_vanish(gold: Tree, found: Tree, symbols: Sequence[str], point: int) -> bool:
    """Whether both are 0 but for rounding: with twice the digits they are smaller by far."""
    few, many = (_at(gold, found, symbols, point, digits) for digits in (DIGITS, 2 * DIGITS))
    if few is None or many is None:
        return False
    limit = mpmath.mpf(10) ** -(DIGITS // 2)
    return all(abs(new) <= limit * abs(old) for old, new in zip(few, many, strict=True))


def _is_infinite(tree: Tree) -> bool:
    return _sign_of_infinity(tree) != 0


def _sign_of_infinity(tree: Tree) -> int:
    if tree == ("const", "oo"):
        return 1
    return -_sign_of_infinity(tree[1]) if tree[0] == "neg" else 0


def proportional(first: Tree, second: Tree) -> mpmath.mpc | None:
    """The constant that ``first`` is of ``second``; None where there is none or no symbol."""
    symbols = sorted(names(first) | names(second))
    if not symbols:
        return None
    ratios = list(_ratios(first, second, symbols))
    if len(ratios) < _ENOUGH_POINTS or not all(_close(*pair) for pair in pairwise(ratios)):
        return None
    return ratios[0] or None


def _ratios(first: Tree, second: Tree, symbols: Sequence[str]) -> Iterator[mpmath.mpc]:
    for point in range(len(_POINTS)):
        values = _at(first, second, symbols, point, DIGITS)
        if values is not None and values[1] != 0:
            with mpmath.workdps(DIGITS):
                yield values[0] / values[1]


def is_worked_out_as(tree: Tree, plain: Plain) -> bool:
    """Whether a decimal is an irrational number to its digits.

    A rational one that is not written as a plain number is a sum still to be done.
    """
    if plain.digits is None or names(tree):
        return False
    try:
        if exact_value(tree) is not None:
            return False
        value = numeric_value(tree, {})
    except NoValue:
        return False
    if mpmath.im(value) != 0 or value == 0:
        return False
    return plain.stands_for(_fraction(mpmath.re(value)))


def _fraction(value: mpmath.mpf) -> Fraction:
    mantissa, exponent = mpmath.mpf(value).man_exp
    return Fraction(mantissa) * Fraction(2) ** exponent


def known_value(tree: Tree) -> Fraction | None:
    """Of a tree that is rational by arithmetic alone and not too large; None of any other."""
    try:
        return exact_value(tree)
    except NoValue:
        return None
