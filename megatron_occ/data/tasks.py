"""Generated problems with written-out solutions: reversed multiplication and addition.

All numbers are written least significant digit first and at a fixed width. The next digit then
depends on digits already written and on a carry, never on a carry still to come, and every digit
column sits at a constant distance from the digits it is computed from. Both help a small
transformer, and its MTP heads, which have to write the digit after next as well.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_occ.data.splits import OperandSplits

# Shared by all tasks, so that a model trained on one can go on with another.
ARITHMETIC_ALPHABET = "0123456789+*=."
STOP = "."
# Keeps the span of an operand far below 2**64, where drawing by remainder stays uniform.
MAX_DIGITS = 12
MAX_TERMS = 9


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt + solution`` is the full text, ``answer`` what a verifier compares."""

    prompt: str
    solution: str
    answer: str
    task_name: str


class Task(Protocol):
    """A stateless source of problems. ``name`` is also the name of the verifier."""

    name: str
    alphabet: str
    stop: str

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split`` ("train" or "validation"): always the same one."""
        ...

    def params(self) -> dict[str, int]:
        """The parameters that ``build_task`` needs to make this task again."""
        ...


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
        _check_int("digits_a", digits_a, 1, MAX_DIGITS)
        _check_int("digits_b", digits_b, 1, MAX_DIGITS)
        _check_int("seed", seed, 0, None)
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
        a, b = self._splits.operands(split, index)
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
        _check_int("digits", digits, 1, MAX_DIGITS)
        _check_int("terms", terms, 2, MAX_TERMS)
        _check_int("seed", seed, 0, None)
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
        operands = self._splits.operands(split, index)
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


_TASKS: dict[str, type[ReversedMultiplication] | type[ReversedAddition]] = {
    ReversedMultiplication.name: ReversedMultiplication,
    ReversedAddition.name: ReversedAddition,
}


TASK_NAMES = tuple(_TASKS)


def build_task(name: str, **params: int) -> Task:
    """Make a task by name, for example ``build_task("reversed_addition", digits=3, seed=1)``.

    Raises ValueError for an unknown name or parameter (with the closest known one) and for a
    parameter out of range.
    """
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}{_did_you_mean(name, list(_TASKS))}")
    task_class = _TASKS[name]
    known = list(inspect.signature(task_class).parameters)
    for key in params:
        if key not in known:
            raise ValueError(f"task {name} has no parameter {key!r}{_did_you_mean(key, known)}")
    return task_class(**params)


def _reversed(value: int, width: int) -> str:
    return str(value)[::-1].ljust(width, "0")


def _check_int(name: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ":"
    return f"{hint} known: {', '.join(known)}"
