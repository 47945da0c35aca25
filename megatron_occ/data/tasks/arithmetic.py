"""Arithmetic with written-out solutions: reversed multiplication and addition.

All numbers are written least significant digit first and at a fixed width. The next digit then
depends on digits already written and on a carry, never on a carry still to come, and every digit
column sits at a constant distance from the digits it is computed from. Both help a small
transformer, and its MTP heads, which have to write the digit after next as well.
"""

from __future__ import annotations

from megatron_occ.data.splits import OperandSplits
from megatron_occ.data.tasks.common import STOP, Problem, check_int

# Shared by both, so that a model trained on one can go on with the other.
ARITHMETIC_ALPHABET = "0123456789+*=."
# Keeps the span of an operand far below 2**64, where drawing by remainder stays uniform.
MAX_DIGITS = 12
MAX_TERMS = 9


class ReversedMultiplication:
    """Long multiplication of two numbers: ``rev(a)*rev(b)=partial+...+partial=rev(a*b).``

    There is one partial product for each digit of b, least significant first. Reversed, the place
    value of that digit is a run of leading zeros, so that equal columns stay aligned.
    Widths: partial i has ``i + digits_a + 1`` characters, the product ``digits_a + digits_b``.

    Worked example, 123 * 45 = 5535 (digits_a=3, digits_b=2)::

        prompt    321*54=
        solution  5160+02940=53550.

    123*5 = 615 is "516" and at width 4 "5160"; 123*4 = 492 is "294", at width 4 "2940", shifted
    by one place "02940"; 5535 is "5355" and at width 5 "53550", which is the answer.
    """

    name = "reversed_multiplication"
    alphabet = ARITHMETIC_ALPHABET
    stop = STOP

    def __init__(self, digits_a: int = 3, digits_b: int = 2, seed: int = 0) -> None:
        """Raises ValueError when a parameter is not an integer or out of range."""
        check_int("digits_a", digits_a, 1, MAX_DIGITS)
        check_int("digits_b", digits_b, 1, MAX_DIGITS)
        check_int("seed", seed, 0, None)
        self._params = {"digits_a": digits_a, "digits_b": digits_b, "seed": seed}
        self._partial_width = digits_a + 1
        self._product_width = digits_a + digits_b
        self._splits = OperandSplits((digits_a, digits_b), seed)

    def params(self) -> dict[str, int]:
        """The parameters that ``build_task`` needs to make this task again."""
        return dict(self._params)

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``: always the same one, whatever was drawn before.

        Raises ValueError for an unknown split or an index that the split does not have.
        """
        a, b = self._splits.values(split, index)
        multiplier = str(b)[::-1]
        partials = "+".join(
            "0" * place + _reversed(a * int(digit), self._partial_width)
            for place, digit in enumerate(multiplier)
        )
        answer = _reversed(a * b, self._product_width)
        return Problem(
            prompt=f"{str(a)[::-1]}*{multiplier}=",
            solution=f"{partials}={answer}{STOP}",
            answer=answer,
            task_name=self.name,
        )


class ReversedAddition:
    """Sum of several numbers, one addition at a time: the easier task.

    After each addition the running sum takes the place of its two terms. Sums have the width of
    the largest possible total.

    Worked example, 12 + 34 + 56 = 102 (digits=2, terms=3)::

        prompt    21+43+65=
        solution  640+65=201.

    With two terms there is nothing in between: 12 + 34 is ``21+43=`` and ``640.``
    """

    name = "reversed_addition"
    alphabet = ARITHMETIC_ALPHABET
    stop = STOP

    def __init__(self, digits: int = 3, terms: int = 2, seed: int = 0) -> None:
        """Raises ValueError when a parameter is not an integer or out of range."""
        check_int("digits", digits, 1, MAX_DIGITS)
        check_int("terms", terms, 2, MAX_TERMS)
        check_int("seed", seed, 0, None)
        self._params = {"digits": digits, "terms": terms, "seed": seed}
        self._sum_width = len(str(terms * (10**digits - 1)))
        self._splits = OperandSplits((digits,) * terms, seed)

    def params(self) -> dict[str, int]:
        """The parameters that ``build_task`` needs to make this task again."""
        return dict(self._params)

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``: always the same one, whatever was drawn before.

        Raises ValueError for an unknown split or an index that the split does not have.
        """
        operands = self._splits.values(split, index)
        texts = [str(operand)[::-1] for operand in operands]
        steps = []
        total = operands[0]
        for position, operand in enumerate(operands[1:], start=2):
            total += operand
            steps.append("+".join([_reversed(total, self._sum_width), *texts[position:]]))
        return Problem(
            prompt="+".join(texts) + "=",
            solution="=".join(steps) + STOP,
            answer=steps[-1],
            task_name=self.name,
        )


def _reversed(value: int, width: int) -> str:
    return str(value)[::-1].ljust(width, "0")
