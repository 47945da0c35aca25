"""Whether expressions have the same value: exact, or at points to many digits."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import mpmath

from megatron_occ.rl.rewards.math.evaluate import (
    DIGITS,
    NoValue,
    exact_value,
    names,
    numeric_value,
)
from megatron_occ.rl.rewards.math.expression import TRIGONOMETRIC, Tree
from megatron_occ.rl.rewards.math.number import Plain

# Points at which expressions are compared: symbols are positive at the first ones, of either sign
# at the next; the last two are whole numbers, even and odd, for floors and ceilings.
_POSITIVE, _SIGNED, _WHOLE = (0, 1, 2), (3, 4, 5), (6, 7)
_ENOUGH_POINTS = 2
_AGREE = mpmath.mpf(10) ** -30


def trees_equal(gold: Tree, found: Tree) -> bool:
    """Whether two expressions have the same values, at several points where they have symbols.

    Under roots and logarithms symbols are taken to be positive.
    """
    if gold == found:
        return True
    if _sign_of_infinity(gold) or _sign_of_infinity(found):
        return _sign_of_infinity(gold) == _sign_of_infinity(found)
    if not names(gold) and not names(found):
        return _numbers_equal(gold, found)
    agreed = 0
    for point in _points(gold, found):
        values = _values(gold, found, point)
        if values is None:
            continue
        if not _close(*values) and not _both_vanish(gold, found, point):
            return False
        agreed += 1
    return agreed >= _ENOUGH_POINTS


def _numbers_equal(gold: Tree, found: Tree) -> bool:
    exact = known_value(gold), known_value(found)
    if None not in exact:
        return exact[0] == exact[1]
    values = _values(gold, found, 0)
    return values is not None and (_close(*values) or _both_vanish(gold, found, 0))


def _points(*trees: Tree) -> tuple[int, ...]:
    points = _POSITIVE
    if not any(contains(tree, is_multivalued) for tree in trees):
        points += _SIGNED
    if any(contains(tree, lambda part: part[0] in ("floor", "ceil")) for tree in trees):
        points += _WHOLE
    return points


def contains(tree: Tree, wanted: Callable[[Tree], bool]) -> bool:
    """Whether a tree or a part of it is one that is wanted."""
    if wanted(tree):
        return True
    return any(contains(part, wanted) for part in tree[1:] if isinstance(part, tuple))


def is_multivalued(tree: Tree) -> bool:
    """Whether it is a root, a logarithm, or a power that is not whole."""
    if tree[0] == "pow":
        return known_value(tree[2]) is None or known_value(tree[2]).denominator != 1
    return tree[0] in ("root", "log")


def _values(
    first: Tree, second: Tree, point: int, digits: int = DIGITS
) -> tuple[mpmath.mpc, mpmath.mpc] | None:
    found = _value(first, point, digits), _value(second, point, digits)
    return None if None in found else found


@lru_cache(1024)
def _value(tree: Tree, point: int, digits: int) -> mpmath.mpc | None:
    with mpmath.workdps(digits):
        places = {name: _place(name, point) for name in names(tree)}
    try:
        return numeric_value(tree, places, digits)
    except NoValue:
        return None


def _place(name: str, point: int) -> mpmath.mpf:
    """Value of a symbol at a point: from its name, so that it is the same in both expressions."""
    draw = zlib.crc32(f"{name} {point}".encode())
    if point in _WHOLE:
        return mpmath.mpf(4 + 2 * (draw % 4) + (point == _WHOLE[-1]))
    place = mpmath.mpf(300 + draw % 2500) / (997 + point)
    return -place if point in _SIGNED and draw >> 16 & 1 else place


def _close(first: mpmath.mpc, second: mpmath.mpc) -> bool:
    """Relative: numbers may be as small as they like."""
    with mpmath.workdps(DIGITS):
        return abs(first - second) <= _AGREE * max(abs(first), abs(second))


def _both_vanish(gold: Tree, found: Tree, point: int) -> bool:
    """Whether both are 0 but for rounding: with twice the digits they are smaller by far."""
    few, many = (_values(gold, found, point, digits) for digits in (DIGITS, 2 * DIGITS))
    if few is None or many is None:
        return False
    limit = mpmath.mpf(10) ** -(DIGITS // 2)
    return all(abs(new) <= limit * abs(old) for old, new in zip(few, many, strict=True))


def _sign_of_infinity(tree: Tree) -> int:
    if tree == ("const", "oo"):
        return 1
    return -_sign_of_infinity(tree[1]) if tree[0] == "neg" else 0


def proportional(first: Tree, second: Tree) -> mpmath.mpc | None:
    """The constant that ``first`` is of ``second``; None where there is none or no symbol."""
    if not names(first) and not names(second):
        return None
    pairs = (_values(first, second, point) for point in _points(first, second))
    with mpmath.workdps(DIGITS):
        ratios = [pair[0] / pair[1] for pair in pairs if pair is not None and pair[1] != 0]
    if len(ratios) < _ENOUGH_POINTS or not all(_close(*pair) for pair in pairwise(ratios)):
        return None
    return ratios[0] or None


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


# functions that say the same of an angle, or of a growth
_KINDS = (
    frozenset(f"{arc}{name}" for arc in ("", "arc") for name in TRIGONOMETRIC),
    frozenset(("log", "exp", "sinh", "cosh", "tanh")),
    frozenset(("fact", "binom", "floor", "ceil")),
)


def is_as_worked_out(tree: Tree, gold: Tree) -> bool:
    """Whether a number is written with no more left to do than the reference.

    It may not use kinds of functions that the reference has not, have more sums, or multiply or
    raise sums where the reference does not.
    """
    for kind in _KINDS:
        if _uses(tree, kind) and not _uses(gold, kind):
            return False
    if _count(tree, _is_sum) > _count(gold, _is_sum):
        return False
    return not contains(tree, _works_on_sums) or contains(gold, _works_on_sums)


def _uses(tree: Tree, functions: frozenset[str]) -> bool:
    return contains(tree, lambda part: part[0] in functions)


def _count(tree: Tree, wanted: Callable[[Tree], bool]) -> int:
    parts = (part for part in tree[1:] if isinstance(part, tuple))
    return wanted(tree) + sum(_count(part, wanted) for part in parts)


def _is_sum(tree: Tree) -> bool:
    return tree[0] == "add"


def _works_on_sums(tree: Tree) -> bool:
    """A product of sums, or a whole power of one."""
    if tree[0] == "mul":
        return all(contains(part, _is_sum) for part in tree[1:])
    return tree[0] == "pow" and _is_sum(tree[1])
