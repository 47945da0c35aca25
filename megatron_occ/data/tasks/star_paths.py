"""Paths in star graphs: the smallest planning problem (Bachmann and Nagarajan, 2403.06963)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise

from megatron_occ.data.splits import DrawnSplits, shuffled
from megatron_occ.data.tasks.common import STOP, Problem, check_int

NODES = string.ascii_lowercase


class StarPaths:
    """The path from the centre of a star to the end of one of its arms.

    A star has ``degree`` arms, each a path of ``length`` nodes with the centre among them. The
    prompt lists the edges in random order, each from its node nearer to the centre to the other
    one, then start and goal. The start is always the centre, the goal the end of an arm.

    Written forwards at once, the first step has to be guessed (one arm in ``degree``): it shows
    only at the other end of the arm, and next-token training does not learn to look there
    (section 4 of the paper). Backwards every step is one look-up, so the solution is written from
    the goal to the start first, and the path then is its reversal.

    Worked example, arms s-a-b, s-c-d, s-e-f and goal d (degree=3, length=3)::

        prompt    ab,sc,ef,sa,cd,se:sd=
        solution  dcs=scd.
    """

    name = "star_paths"
    # of all letters: a model trained on few can go on with more
    alphabet = NODES + ",:=" + STOP
    stop = STOP

    def __init__(
        self, degree: int = 3, length: int = 4, letters: int = len(NODES), seed: int = 0
    ) -> None:
        """``letters``: how many of the alphabet name nodes; the fewer, the sooner it is learned.

        Raises ValueError when a parameter is out of range, or a star has too many nodes.
        """
        check_int("degree", degree, 2, len(NODES) - 1)
        check_int("length", length, 2, len(NODES) // 2)
        check_int("letters", letters, 1, len(NODES))
        check_int("seed", seed, 0, None)
        nodes = 1 + degree * (length - 1)
        if nodes > letters:
            raise ValueError(
                f"degree={degree} arms of length={length} have {nodes} nodes, and there are "
                f"{letters} letters for them: lower one of the two, or raise letters (at most "
                f"{len(NODES)})"
            )
        self._params = {"degree": degree, "length": length, "letters": letters, "seed": seed}
        self._length, self._letters = length, letters
        self._splits = DrawnSplits(range(letters, letters - nodes, -1), seed, self._star)

    def params(self) -> dict[str, int]:
        """The parameters that ``build_task`` needs to make this task again."""
        return dict(self._params)

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``: always the same one, whatever was drawn before.

        Raises ValueError for an unknown split or an index that the split does not have.
        """
        star = self._splits.values(split, index)
        centre, inner = star[0], self._length - 1
        arms = [(centre, *star[first : first + inner]) for first in range(1, len(star), inner)]
        edges = [edge for arm in arms for edge in pairwise(arm)]
        path = "".join(NODES[node] for node in arms[0])
        listed = ",".join(NODES[a] + NODES[b] for a, b in shuffled(edges, star))
        return Problem(
            prompt=f"{listed}:{path[0]}{path[-1]}=",
            solution=f"{path[::-1]}={path}{STOP}",
            answer=path,
            task_name=self.name,
        )

    def _star(self, draws: Sequence[int]) -> tuple[int, ...]:
        """Nodes of the centre, the arm of the goal and the other arms, these in sorted order.

        Draw i picks one of the nodes that are left. Sorted, because two stars that differ in the
        order of the other arms are one problem.
        """
        left = list(range(self._letters))
        nodes = [left.pop(draw) for draw in draws]
        inner = self._length - 1
        arms = [tuple(nodes[first : first + inner]) for first in range(1, len(nodes), inner)]
        return (nodes[0], *arms[0], *(node for arm in sorted(arms[1:]) for node in arm))
