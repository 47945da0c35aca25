"""What an answer can be: a number, an expression, words, or several of these together."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.rl.rewards.math.expression import Tree
from megatron_occ.rl.rewards.math.number import Plain


@dataclass(frozen=True)
class Leaf:
    """One number, expression or piece of text.

    Args:
        text: normalized, what no other field tells.
        plain: where it is a plain number.
        tree: where it is an expression, plain numbers too.
        unit: canonical; "" without one.
        name: of an assignment ("x" of "x = 3"), "" without one.
    """

    text: str
    plain: Plain | None = None
    tree: Tree | None = None
    unit: str = ""
    name: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is neither number nor expression."""
        return self.tree is None


@dataclass(frozen=True)
class Relation:
    """``left operation right`` with "<", "<=", "!=" or "="; ">" is turned around."""

    operation: str
    left: Leaf
    right: Leaf

    is_text = False


@dataclass(frozen=True)
class Group:
    """Several answers.

    Args:
        kind: "list" (of no brackets), "set", "tuple", "matrix", "union", "chain" (of relations).
        items: leaves, relations or groups.
        brackets: of a tuple, as "(]".
        shape: rows and columns of a matrix.
    """

    kind: str
    items: tuple[Answer, ...]
    brackets: str = ""
    shape: tuple[int, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether a part of it is."""
        return any(item.is_text for item in self.items)


Answer = Leaf | Relation | Group
