"""The verifier ``math``: what it finds, what it takes for equal, and what can't hurt it."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_occ.rl.rewards.math.evaluate import NoValue, exact_value, numeric_value
from megatron_occ.rl.rewards.math.expression import NotAnExpression, parse_expression
from megatron_occ.rl.rewards.math.extract import candidates
from megatron_occ.rl.rewards.math.number import parse_plain, rounded
from megatron_occ.rl.rewards.math.units import canonical_unit
from megatron_occ.rl.rewards.math.values import trees_equal
from megatron_occ.rl.rewards.math.verifier import math_dapo_verifier, math_verifier
from tests.unit.math_forms import ANNOUNCED, HOSTILE, RIGHT, WRONG

PIECES = r"""
1 73 0 . x i e \pi \frac \sqrt { } ( ) [ ] ^ _ + - * / = < > , ; \text{ km m/s \cup \{ \} \pm ! | %
$ \boxed{ Answer: #### \log \sin \binom \begin{pmatrix} \end{pmatrix} \\ & \infty \in \le \approx °
² 10^{ e33 1,000 base \left \lfloor \degree ' 100!
"""
DOCS = Path(__file__).resolve().parents[2] / "docs" / "verifiers.md"
ROW = re.compile(r"\| `(.+?)` \| `(.+?)` \| ([01]) \|")


@pytest.mark.parametrize(("response", "answer", "score"), ANNOUNCED)
def test_answers_that_words_announce(response, answer, score):
    assert math_verifier(response, answer) == score


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right_answers_in_boxes(response, answer):
    assert math_verifier(response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong_answers_in_boxes(response, answer):
    assert math_verifier(response, answer) == 0.0


def test_the_table_of_the_docs():
    rows = ROW.findall(DOCS.read_text())
    assert len(rows) > 35
    for response, answer, score in rows:
        assert math_verifier(response, answer) == float(score), (response, answer)


@pytest.mark.parametrize("form", ["\\boxed{%s}", "Answer: %s", "#### %s", "%s"])
def test_hostile_answers_score_nothing(form):
    references = ("5", "x^2+1", "(3,2)", "east", "1, 2, 3", r"\sqrt{2}", "x>5", "1/3")
    for text in HOSTILE:
        for answer in references:
            assert math_verifier(form.replace("%s", text), answer) == 0.0, (text, answer)


def test_whatever_is_written_has_a_score():
    draw = random.Random(0)
    for _ in range(3000):
        text = " ".join(draw.choices(PIECES.split(), k=draw.choice((3, 8, 30))))
        assert math_verifier(f"\\boxed{{{text}}}", "5") in (0.0, 1.0)
        assert math_verifier("\\boxed{5}", f"{text} 1") in (0.0, 1.0)


@pytest.mark.parametrize(
    ("response", "box_first", "line_first"),
    [
        ("\\boxed{72}\nAnswer: 73", 0, 1),
        ("Answer: 73\n\\boxed{72}", 0, 1),
        ("**Answer:** 73\n\\boxed{72}", 0, 1),
        ("\\boxed{73}", 1, 1),
        ("The answer is 73", 1, 1),
        ("Answer: $\\boxed{73}$.", 1, 1),
        ("My answer: 72\n#### 73", 1, 1),
    ],
)
def test_the_order_is_a_choice(response, box_first, line_first):
    assert math_verifier(response, "73") == box_first
    assert math_dapo_verifier(response, "73") == line_first


@pytest.mark.parametrize("answer", ["", " ", "$$", "\\boxed{}", "."])
def test_an_empty_reference_is_refused(answer):
    with pytest.raises(ValueError, match="is empty: no response could be right"):
        math_verifier("\\boxed{18}", answer)


def test_a_runaway_answer_is_none():
    assert math_verifier("\\boxed{" + "1" * 2000 + "}", "1" * 2000) == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", [(r"\frac{1}{2}",)]),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", [("2",), ("1", "2")]),
        (r"\boxed{1}, \text{ and } \boxed{2}", [("2",), ("1", "2")]),
        (r"\boxed{\left\{x\right.} .", [(r"\left\{x\right.",)]),
        (r"\boxed{3} #### 4", [("3",)]),
        (r"\boxed{3} and \boxed{4", []),
        (r"\boxed{}", []),
        ("1 + 1\n#### $70,000\nbye", [("$70,000",)]),
        ("The answer is 1. The answer is: $x^2$. I hope so.", [("$x^2$",), ("1",)]),
        ("Answer: 12.5.\nnext line", [("12.5",)]),
        ("The answer is\n\\[\n73\n\\]", [("73",)]),
        ("I think it is 7", []),
        ("####", []),
        ("", []),
    ],
)
def test_where_the_answer_stands(text, found):
    assert list(dict.fromkeys(texts for texts, _ in candidates(text))) == found


@pytest.mark.parametrize(
    ("text", "value", "digits", "reduced"),
    [
        ("1,234.50", Fraction(2469, 2), 6, True),
        ("-.5", Fraction(-1, 2), 1, True),
        ("6.02\\times 10^{23}", Fraction(602 * 10**21), 3, True),
        ("1e-7", Fraction(1, 10**7), 1, True),
        ("\\frac{-3}{4}", Fraction(-3, 4), None, True),
        ("2/4", Fraction(1, 2), None, False),
        ("-1\\frac{1}{2}", Fraction(-3, 2), None, True),
        ("3 1/2", Fraction(7, 2), None, True),
        ("(12)", Fraction(12), None, True),
    ],
)
def test_plain_numbers(text, value, digits, reduced):
    found = parse_plain(text)
    assert (found.value, found.digits, found.reduced) == (value, digits, reduced)


@pytest.mark.parametrize(
    "text", ["12*12", "2^10", "1/0", "7 3", "(12,102)", "1e9999", "x", "", "--1"]
)
def test_what_is_no_plain_number(text):
    assert parse_plain(text) is None


def test_a_decimal_stands_for_what_it_is_rounded_from():
    third = Fraction(1, 3)
    assert rounded(third, 6) == Fraction("0.333333")
    assert rounded(Fraction(2, 3) * 10**9, 6) == 666667000
    assert rounded(Fraction(1, 3) / 10**5000, 2) == Fraction(33, 10**5002)
    assert parse_plain("0.333333").stands_for(third)
    assert not parse_plain("0.333334").stands_for(third)
    assert not parse_plain("0.33333").stands_for(third)
    assert not parse_plain("1.23457e8").stands_for(Fraction(123456789))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2\\cdot 3^2", 19),
        ("-2^2", -4),
        ("2^{-1}", Fraction(1, 2)),
        ("2^3^2", 512),
        ("1/2/2", Fraction(1, 4)),
        ("\\sqrt{\\frac{9}{16}}", Fraction(3, 4)),
        ("\\sqrt[3]{-8}", -2),
        ("8^{2/3}", 4),
        ("5!/3!", 20),
        ("\\binom{5}{2}", 10),
        ("\\lfloor -1.5 \\rfloor", -2),
        ("|2-5|", 3),
        ("\\frac12", Fraction(1, 2)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
    ],
)
def test_exact_values(text, value):
    assert exact_value(parse_expression(text)) == value


def test_values_to_sixty_digits():
    identities = (
        ("\\sin^2 x + \\cos^2 x", "1"),
        ("\\sin^{-1} x", "\\arcsin x"),
        ("\\log_2 x", "\\frac{\\ln x}{\\ln 2}"),
        ("e^{i\\pi}", "-1"),
        ("\\sqrt{2}\\sqrt{3}", "\\sqrt{6}"),
        ("60\\degree", "\\frac{\\pi}{3}"),
        ("\\frac{n!}{(n-1)!}", "n"),
    )
    for one, other in identities:
        assert trees_equal(parse_expression(one), parse_expression(other)), (one, other)
    close = "e^{\\pi\\sqrt{163}}", "262537412640768744"
    assert not trees_equal(*map(parse_expression, close))


@pytest.mark.parametrize(
    "text", ["2 3", "x +", "(1", "1)", "\\int x", "x__1", "()", "a = b", "((" * 50]
)
def test_what_is_no_expression(text):
    with pytest.raises(NotAnExpression):
        parse_expression(text)


@pytest.mark.parametrize("text", ["9^{9^{9}}", "100000!", "1/0", "0^{-1}", "\\binom{10^9}{5}"])
def test_values_that_no_answer_means(text):
    with pytest.raises(NoValue):
        exact_value(parse_expression(text))
    with pytest.raises(NoValue):
        numeric_value(parse_expression(text), {})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("square meters", "m^2"),
        ("kilometers per hour", "km/h"),
        ("m s^{-1}", "m/s"),
        ("Clips", "clip"),
        ("\\$", "dollars"),
    ],
)
def test_units_have_one_spelling(one, other):
    assert canonical_unit(one) == canonical_unit(other)
