"""Generated problems: the format, the arithmetic, and that the verifier agrees."""

from __future__ import annotations

import pytest

from megatron_occ.data import ReversedAddition, ReversedMultiplication, build_task
from megatron_occ.rl.rewards import get_verifier

CONFIGURATIONS = [
    ("reversed_multiplication", {"digits_a": 3, "digits_b": 2}),
    ("reversed_multiplication", {"digits_a": 2, "digits_b": 4}),
    ("reversed_multiplication", {"digits_a": 1, "digits_b": 1}),
    ("reversed_addition", {"digits": 3, "terms": 2}),
    ("reversed_addition", {"digits": 2, "terms": 5}),
    ("reversed_addition", {"digits": 12, "terms": 9}),
    ("star_paths", {"degree": 3, "length": 4}),
    ("star_paths", {"degree": 12, "length": 3}),
]


def number(text: str) -> int:
    return int(text[::-1])


class FixedOperands:
    def __init__(self, *operands: int) -> None:
        self._operands = operands

    def values(self, split: str, index: int) -> tuple[int, ...]:
        return self._operands


def test_multiplication_worked_example():
    task = ReversedMultiplication(digits_a=3, digits_b=2)
    task._splits = FixedOperands(123, 45)
    problem = task.problem("train", 0)
    assert problem.prompt == "321*54="
    assert problem.solution == "5160+02940=53550."
    assert problem.answer == "53550"
    assert problem.task_name == task.name == "reversed_multiplication"


def test_addition_worked_example():
    task = ReversedAddition(digits=2, terms=3)
    task._splits = FixedOperands(12, 34, 56)
    problem = task.problem("train", 0)
    assert (problem.prompt, problem.solution) == ("21+43+65=", "640+65=201.")
    assert problem.answer == "201"


def test_multiplication_partials_are_those_of_the_digits_of_b():
    task = build_task("reversed_multiplication", digits_a=3, digits_b=3, seed=2)
    for index in range(200):
        problem = task.problem("train", index)
        a, b = (number(text) for text in problem.prompt.rstrip("=").split("*"))
        written, product = problem.solution.rstrip(".").split("=")
        partials = [number(text) for text in written.split("+")]
        assert partials == [a * (b // 10**i % 10) * 10**i for i in range(3)]
        assert number(product) == sum(partials) == a * b
        assert product == problem.answer


def test_addition_steps_all_have_the_same_value():
    task = build_task("reversed_addition", digits=3, terms=4, seed=1)
    for index in range(200):
        problem = task.problem("train", index)
        sides = (problem.prompt + problem.solution).rstrip(".").split("=")
        values = {sum(number(term) for term in side.split("+")) for side in sides}
        assert len(values) == 1
        assert [side.count("+") for side in sides] == [3, 2, 1, 0]


@pytest.mark.parametrize(("name", "params"), CONFIGURATIONS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_solution_verifies_and_no_other_answer_does(name, params, split):
    task = build_task(name, seed=4, **params)
    verify = get_verifier(name)
    shapes = set()
    count = 100 if min(params.values()) > 1 else 3
    for index in range(count):
        problem = task.problem(split, index)
        assert verify(problem.solution, problem.answer) == 1.0
        assert verify(problem.prompt + problem.solution, problem.answer) == 1.0
        wrong = problem.solution[:-2] + ("1" if problem.solution[-2] == "0" else "0") + task.stop
        assert verify(wrong, problem.answer) == 0.0
        assert set(problem.prompt + problem.solution) <= set(task.alphabet)
        assert problem.solution.index(task.stop) == len(problem.solution) - 1
        shapes.add((len(problem.prompt), len(problem.solution), len(problem.answer)))
    assert len(shapes) == 1, "problems of one configuration have one length"


def test_task_is_made_again_from_its_name_and_parameters():
    task = build_task("reversed_multiplication", digits_a=2, digits_b=2, seed=9)
    again = build_task(task.name, **task.params())
    assert task.params() == {"digits_a": 2, "digits_b": 2, "seed": 9}
    assert [again.problem("train", i) for i in range(20)] == [
        task.problem("train", i) for i in range(20)
    ]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("reversed_multiplicaton", {}, "did you mean 'reversed_multiplication'"),
        ("zzz", {}, "known: reversed_multiplication, reversed_addition, star_paths"),
        ("reversed_multiplication", {"digit_a": 3}, "did you mean 'digits_a'"),
        ("reversed_multiplication", {"digits_a": 0}, "digits_a must be between 1 and 12, got 0"),
        ("reversed_multiplication", {"digits_b": 13}, "digits_b must be between 1 and 12, got 13"),
        ("reversed_multiplication", {"digits_a": 2.0}, "digits_a must be an integer, got 2.0"),
        ("reversed_multiplication", {"seed": -1}, "seed must be at least 0, got -1"),
        ("reversed_addition", {"terms": 1}, "terms must be between 2 and 9, got 1"),
        ("reversed_addition", {"digits": True}, "digits must be an integer, got True"),
        ("star_paths", {"degree": 1}, "degree must be between 2 and 25, got 1"),
        ("star_paths", {"degree": 5, "length": 7}, "have 31 nodes, and there are 26 letters"),
    ],
)
def test_bad_names_and_parameters_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        build_task(name, **params)
