"""Paths in star graphs: what the prompt says, and that no star is in both splits."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_occ.data import build_task
from megatron_occ.data.tasks import StarPaths


class FixedStar:
    """The star of the docstring's worked example: s-a-b, s-c-d, s-e-f, the goal arm first."""

    def values(self, split: str, index: int) -> tuple[int, ...]:
        return tuple("abcdefghijklmnopqrstuvwxyz".index(node) for node in "scdabef")


def read(prompt: str) -> tuple[list[str], str, str]:
    """Edges, start and goal that a prompt names."""
    edges, ends = prompt.removesuffix("=").split(":")
    return edges.split(","), ends[0], ends[1]


def paths_to(goal: str, edges: list[str], start: str) -> list[str]:
    """All walks along edges from start to goal, by trying every node: shares no code."""
    found, walks = [], [start]
    while walks:
        found += [walk for walk in walks if walk[-1] == goal]
        walks = [walk + edge[1] for walk in walks for edge in edges if edge[0] == walk[-1]]
    return found


def test_worked_example():
    task = StarPaths(degree=3, length=3)
    task._splits = FixedStar()
    problem = task.problem("train", 0)
    edges, start, goal = read(problem.prompt)
    assert sorted(edges) == ["ab", "cd", "ef", "sa", "sc", "se"]
    assert (start, goal) == ("s", "d")
    assert problem.solution == "dcs=scd."
    assert problem.answer == "scd"


@pytest.mark.parametrize(("degree", "length"), [(2, 4), (3, 4), (5, 6)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_answer_is_the_only_path_and_the_graph_a_star(degree, length, split):
    task = build_task("star_paths", degree=degree, length=length, seed=3)
    for index in range(50):
        problem = task.problem(split, index)
        edges, start, goal = read(problem.prompt)
        assert paths_to(goal, edges, start) == [problem.answer]
        assert len(problem.answer) == length
        assert len(set(edges)) == len(edges) == degree * (length - 1)
        out = Counter(edge[0] for edge in edges)
        assert out.pop(start) == degree and set(out.values()) <= {1}
        assert set(Counter(edge[1] for edge in edges).values()) == {1}
        assert problem.solution == f"{problem.answer[::-1]}={problem.answer}."


def test_the_order_of_the_edges_tells_nothing_of_the_goal():
    # the goal's last edge is at each of the four places equally often: 500 each, deviation 19
    task = build_task("star_paths", degree=2, length=3)
    places = Counter()
    for index in range(2000):
        edges, _, goal = read(task.problem("train", index).prompt)
        places[[edge[1] for edge in edges].index(goal)] += 1
    assert all(420 < places[place] < 580 for place in range(4))


def star(prompt: str) -> tuple[frozenset[str], str, str]:
    edges, start, goal = read(prompt)
    return frozenset(edges), start, goal


def test_no_star_is_in_both_splits_whatever_the_order_of_its_edges():
    # 26 * 25 * 24 * 23 draws, of which each star of three arms is two: few enough to meet again
    shape = {"degree": 3, "length": 2}
    held_out = {star(build_task("star_paths", **shape).problem("validation", 0).prompt)}
    task = build_task("star_paths", **shape)
    listed = [star(task.problem("validation", index).prompt) for index in range(3000)]
    held_out.update(listed)
    assert len(held_out) == len(listed) == 3000
    for seed in (0, 1):
        train = build_task("star_paths", seed=seed, **shape)
        drawn = {star(train.problem("train", index).prompt) for index in range(20_000)}
        assert not drawn & held_out
        assert len(drawn) > 15_000


def test_seeds_draw_other_training_problems_and_the_same_held_out_ones():
    one, other = (build_task("star_paths", seed=seed) for seed in (0, 1))
    pairs = [[task.problem("train", index) for index in range(100)] for task in (one, other)]
    assert not any(a == b for a, b in zip(*pairs, strict=True))
    for index in range(100):
        assert one.problem("validation", index) == other.problem("validation", index)
