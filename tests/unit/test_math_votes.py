"""Which responses give the same answer, in this process and through the pool."""

from __future__ import annotations

import pytest

from megatron_occ.rl.rewards import Question, VerifierPool
from megatron_occ.rl.rewards.math.verifier import math_verifier
from megatron_occ.rl.rewards.math.votes import math_dapo_votes, math_votes

RESPONSES = [
    r"\boxed{12}",
    r"It is \boxed{\frac{1}{2}}.",
    "The answer is 12.",
    r"\boxed{0.5}",
    "I do not know",
    r"\boxed{\frac{2}{4}}",
    r"first \boxed{12}, then \boxed{7}",
    r"\boxed{7",
]


def votes_of(responses, answer, function=math_votes):
    right = [math_verifier(response, answer) == 1 for response in responses]
    return function(responses, answer, right)


def test_equal_wrong_answers_share_a_group_and_right_ones_are_one():
    found = votes_of(RESPONSES, "12")
    assert [group for _, group in found] == [0, 1, 0, 1, -1, 1, 2, -1]
    assert [text for text, _ in found] == [
        "12", r"\frac{1}{2}", "12", "0.5", "", r"\frac{2}{4}", "7", "",
    ]  # fmt: skip


def test_the_same_responses_to_another_reference():
    """2/4 is not in lowest terms, and so no right answer."""
    assert [group for _, group in votes_of(RESPONSES, "1/2")] == [1, 0, 1, 0, -1, 2, 3, -1]


def test_several_boxes_are_the_answer_to_a_reference_of_several_values():
    responses = [r"\boxed{1} and \boxed{2}", r"\boxed{2} and \boxed{1}", r"\boxed{3} or \boxed{4}"]
    found = votes_of(responses, "1, 5")
    assert [group for _, group in found] == [1, 1, 2]
    assert found[0][0] == "1, 2"


def test_dapo_reads_the_line_before_the_box():
    response = "\\boxed{3}\nAnswer: 4"
    assert math_dapo_votes([response], "12", [False]) == [("4", 1)]
    assert math_votes([response], "12", [False]) == [("3", 1)]


def test_the_pool_tells_votes_and_why_there_are_none():
    questions = [
        Question("math", RESPONSES[:5], "12", [True, False, True, False, False]),
        Question("exact", ["a", "b"], "a", [True, False]),
        Question("math", ["x"], "", [False]),
    ]
    with VerifierPool(timeout_seconds=20.0, workers=2) as pool:
        of_math, of_text, of_nothing = pool.votes(questions)
        assert pool.score([("math", RESPONSES[0], "12")])[0].score == 1
    assert list(of_math.groups) == [0, 1, 0, 1, -1]
    assert list(of_math.answers) == ["12", r"\frac{1}{2}", "12", "0.5", ""]
    assert of_math.problem == ""
    assert (of_text.groups, of_text.problem) == ((), "verifier 'exact' reads no answers")
    assert "is empty: no response could be right" in of_nothing.problem
    with pytest.raises(ValueError, match="closed"):
        pool.votes(questions)
