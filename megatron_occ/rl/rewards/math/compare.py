"""Whether an answer says what a reference says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import mpmath

from megatron_occ.rl.rewards.math.evaluate import names
from megatron_occ.rl.rewards.math.forms import Answer, Group, Leaf, Relation
from megatron_occ.rl.rewards.math.normalize import TEXT
from megatron_occ.rl.rewards.math.units import same_unit
from megatron_occ.rl.rewards.math.values import (
    is_as_worked_out,
    is_worked_out_as,
    known_value,
    proportional,
    trees_equal,
)

_CHOICE = re.compile(r"\(?([a-jA-J])\)?(?:[.:)\s]((?!\b[A-J]\b).)*)?")
_UNORDERED = ("list", "set", "union", "chain")


def equal(gold: Answer, found: Answer) -> bool:
    """Whether ``found`` says what ``gold`` says. Not symmetric: the reference sets the form."""
    if not isinstance(gold, Relation) and _comes_to_a_number(found):
        return equal(gold, found.right)
    if isinstance(gold, Group) or isinstance(found, Group):
        return _groups_equal(gold, found)
    if isinstance(gold, Relation) or isinstance(found, Relation):
        return _relations_equal(gold, found)
    if _differ(gold.name, found.name):
        return False
    if gold.is_text or found.is_text:
        return _texts_equal(gold.text, found.text)
    return same_unit(gold.unit, found.unit) and _leaves_equal(gold, found)


def _comes_to_a_number(found: Answer) -> bool:
    """Whether it is an equation such as "m + n = 73"."""
    is_equation = isinstance(found, Relation) and found.operation == "="
    return is_equation and found.right.tree is not None and not names(found.right.tree)


def _differ(gold: str, found: str) -> bool:
    """Whether two names are of different things: x and y, f and f'; not "Area" and "A"."""
    if not gold or not found or gold == found:
        return False
    return gold[0] == found[0] or (len(gold) == 1 and len(found) == 1)


def is_choice(text: str) -> bool:
    """Whether an answer is the letter of a choice, "(A)" to "(J)"."""
    return re.fullmatch(r"\(?[A-J]\)?", text) is not None


def _texts_equal(gold: str, found: str) -> bool:
    choice = _CHOICE.fullmatch(found)
    if is_choice(gold) and choice:
        return choice[1].upper() == gold.strip("()")
    return _canonical_text(gold) == _canonical_text(found)


def _canonical_text(text: str) -> str:
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"^(?:the|an?)\s+", "", text.casefold().strip())
    return re.sub(r"[\s$\"']+|\.(?!\d)", "", text)


def _leaves_equal(gold: Leaf, found: Leaf) -> bool:
    if gold.text and _packed(gold.text) == _packed(found.text):
        return True
    if gold.plain and found.plain:
        return _plain_equal(gold, found)
    if gold.plain:
        return is_worked_out_as(found.tree, gold.plain)
    if found.plain:
        exact = known_value(gold.tree)
        if exact is not None:
            return found.plain.value == exact or found.plain.stands_for(exact)
        return is_worked_out_as(gold.tree, found.plain)
    if not names(found.tree) and not is_as_worked_out(found.tree, gold.tree):
        return False
    return trees_equal(gold.tree, found.tree)


def _packed(text: str) -> str:
    """Without spaces but those between digits: "3 1/2" is not "31/2"."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _plain_equal(gold: Leaf, found: Leaf) -> bool:
    if gold.plain.base != found.plain.base and gold.plain.base is not None:
        return False
    if not found.plain.reduced:
        return False
    scales = {1}
    if (gold.unit == "%") != (found.unit == "%"):
        scales.add(Fraction(1, 100) if found.unit == "%" else 100)
    values = [found.plain.value * scale for scale in scales]
    if gold.plain.value in values:
        return True
    return gold.plain.stands_for(found.plain.value) or found.plain.stands_for(gold.plain.value)


def _groups_equal(gold: Answer, found: Answer) -> bool:
    gold, found = _as_group(gold, found), _as_group(found, gold)
    if gold is None or found is None or len(gold.items) != len(found.items):
        return False
    if not _same_kind(gold, found):
        return False
    if _has_names(gold) and _has_names(found):
        return _matched(gold.items, found.items)
    found = _by_name(found)
    is_ordered = not {gold.kind, found.kind} <= set(_UNORDERED)
    if is_ordered or (_has_names(gold) and gold.kind == "list"):
        return all(equal(g, f) for g, f in zip(gold.items, found.items, strict=True))
    return _matched(gold.items, found.items)


def _as_group(answer: Answer, other: Answer) -> Group | None:
    """One answer as a group like the other: relations as an interval, 5 as {5}."""
    kind = other.kind if isinstance(other, Group) else ""
    if kind == "tuple":
        interval = _interval(answer)
        if interval is not None:
            return interval
    if isinstance(answer, Group):
        return answer
    return Group(kind, (answer,)) if kind in ("set", "union", "list") else None


def _same_kind(gold: Group, found: Group) -> bool:
    kinds = {gold.kind, found.kind}
    if kinds == {"tuple"}:
        return gold.brackets == found.brackets
    if kinds == {"matrix"}:
        return gold.shape == found.shape
    if kinds == {"list", "tuple"}:
        # of an interval the brackets are part of the answer
        return "()" in (gold.brackets, found.brackets)
    return len(kinds) == 1 or kinds in ({"list", "set"}, {"list", "union"})


def _has_names(group: Group) -> bool:
    return all(isinstance(item, Leaf) and item.name for item in group.items)


def _by_name(group: Group) -> Group:
    """ "y = 5, x = 3" for a pair: in the order of the names."""
    if not _has_names(group):
        return group
    return replace(group, items=tuple(sorted(group.items, key=lambda item: item.name)))


def _matched(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    """Whether each entry of one has an equal of its own in the other."""
    left = list(found)
    for item in gold:
        place = next((i for i, other in enumerate(left) if equal(item, other)), None)
        if place is None:
            return False
        left.pop(place)
    return True


def _interval(answer: Answer) -> Group | None:
    """``x > 1`` as ``(1, oo)``, ``1 < x <= 2`` as ``(1, 2]``."""
    relations = answer.items if isinstance(answer, Group) and answer.kind == "chain" else (answer,)
    low, high = Leaf("", None, ("neg", ("const", "oo"))), Leaf("", None, ("const", "oo"))
    brackets = ["(", ")"]
    variables = set()
    for relation in relations:
        if not isinstance(relation, Relation) or relation.operation not in ("<", "<="):
            return None
        closed = relation.operation == "<="
        if _is_variable(relation.left):
            variables.add(relation.left.text)
            high, brackets[1] = relation.right, "]" if closed else ")"
        elif _is_variable(relation.right):
            variables.add(relation.right.text)
            low, brackets[0] = relation.left, "[" if closed else "("
        else:
            return None
    return Group("tuple", (low, high), "".join(brackets)) if len(variables) == 1 else None


def _is_variable(leaf: Leaf) -> bool:
    return leaf.tree is not None and leaf.tree[0] == "sym"


def _relations_equal(gold: Answer, found: Answer) -> bool:
    gold, found = _as_equation(gold), _as_equation(found)
    if gold is None or found is None or gold.operation != found.operation:
        return False
    return _same_solutions(gold, found)


def _as_equation(answer: Answer) -> Relation | None:
    """``y = 2x`` is an assignment to be compared with an equation."""
    if isinstance(answer, Relation):
        return answer if None not in (answer.left.tree, answer.right.tree) else None
    if len(answer.name) != 1 or answer.tree is None:
        return None
    return Relation("=", Leaf(answer.name, None, ("sym", answer.name)), answer)


def _same_solutions(gold: Relation, found: Relation) -> bool:
    """Whether left minus right is the same but for a factor: positive for an inequality."""
    first, second = (("add", each.left.tree, ("neg", each.right.tree)) for each in (gold, found))
    ratio = proportional(first, second)
    if ratio is None:
        return False
    return gold.operation not in ("<", "<=") or mpmath.re(ratio) > 0
