"""Deterministic draws for generated problems, split into train and validation by a hash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_occ.config.words import counted

SPLITS = ("train", "validation")
# One problem in ten is held out.
HELD_OUT_ONE_IN = 10
# Draws in a row that give no new held-out problem before there is taken to be none, or that are
# all held out before there is taken to be nothing to train on.
_PATIENCE = 10_000
# Far more than a run draws, so that the train problems of two stream seeds do not overlap.
_PROBLEMS_PER_SEED = 1 << 40

_Item = TypeVar("_Item")
_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# Not a setting: two runs with different seeds must agree on what is held out, or RL with one seed
# would validate on problems that pretraining with another seed has seen.
_SPLIT_SALT = 0x6D65676F6363


def mix64(value: int) -> int:
    """Hash an integer to 64 bits: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    ``mix64(0)``, ``mix64(gamma)``, ``mix64(2 * gamma)``, ... with the golden gamma are the outputs
    of the SplitMix64 generator seeded with 0. A few integer operations, no state to carry.
    """
    value = (value + _GOLDEN_GAMMA) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def first_problem(split: str, stream_seed: int) -> int:
    """First problem index of a stream: its own range of "train", the same "validation" for all.

    Raises ValueError for an unknown split or a negative seed.
    """
    check_split(split)
    if stream_seed < 0:
        raise ValueError(f"seed must be at least 0, got {stream_seed}")
    return stream_seed * _PROBLEMS_PER_SEED if split == "train" else 0


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is one of ``SPLITS``."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")


def is_held_out(values: Sequence[int]) -> bool:
    """Whether the problem with these values belongs to validation; order and all count."""
    state = _SPLIT_SALT
    for value in values:
        state = mix64(state ^ value)
    return state % HELD_OUT_ONE_IN == 0


def shuffled(items: Sequence[_Item], values: Sequence[int]) -> list[_Item]:
    """The items in an order that is a function of ``values`` alone."""
    key = 0
    for value in values:
        key = mix64(key ^ value)
    order = sorted(range(len(items)), key=lambda position: mix64(key + position))
    return [items[position] for position in order]


class DrawnSplits:
    """Tuples of integers by (seed, split, index), whatever was asked for before.

    A problem is drawn as one integer below each of ``spans``, and ``problem`` makes of these draws
    what the task needs, in a form that is the same for draws that mean the same problem. "train" is
    an endless stream drawn with replacement, different for each seed. "validation" is one fixed
    list of distinct problems, the same for every seed, so that runs are compared on the same ones.
    """

    def __init__(
        self,
        spans: Sequence[int],
        seed: int,
        problem: Callable[[Sequence[int]], tuple[int, ...]],
        same: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple,
    ) -> None:
        """``same`` gives problems that must not be in both splits one value; they may differ."""
        self._spans = list(spans)
        self._problem, self._same = problem, same
        self._key = mix64(seed)
        self._total = math.prod(self._spans)
        self._stride = self._coprime_stride()
        # Memo of the validation list. It only grows, and its content depends on nothing but spans
        # and functions, so that it is not visible to the caller.
        self._validation_list: list[tuple[int, ...]] = []
        self._seen: set[tuple[int, ...]] = set()
        self._scanned = self._found_at = 0

    def values(self, split: str, index: int) -> tuple[int, ...]:
        """Problem ``index`` (0-based) of a split.

        Raises ValueError for an unknown split, a negative index, an index past the end of the
        validation split, and where all problems are held out.
        """
        check_split(split)
        if index < 0:
            raise ValueError(f"problem index {index} is negative: indices start at 0")
        return self._train(index) if split == "train" else self._validation(index)

    def _train(self, index: int) -> tuple[int, ...]:
        state = mix64(self._key + index)
        for _ in range(_PATIENCE):
            draws = []
            for span in self._spans:
                state = mix64(state)
                draws.append(state % span)
            problem = self._problem(draws)
            if not is_held_out(self._same(problem)):
                return problem
        raise ValueError("these parameters give so few problems that all of them are held out")

    def _validation(self, index: int) -> tuple[int, ...]:
        while len(self._validation_list) <= index:
            if self._scanned == min(self._total, self._found_at + _PATIENCE):
                raise ValueError(
                    f"validation problem {index} does not exist: these parameters give only "
                    f"{counted(len(self._validation_list), 'held-out problem')}; ask for fewer, or "
                    "make the problems larger"
                )
            self._scan_one()
        return self._validation_list[index]

    def _scan_one(self) -> None:
        # A stride without a common factor visits every tuple once, in a spread-out order.
        position = self._scanned * self._stride % self._total
        self._scanned += 1
        draws = []
        for span in self._spans:
            position, draw = divmod(position, span)
            draws.append(draw)
        problem = self._problem(draws)
        key = self._same(problem)
        if is_held_out(key) and key not in self._seen:
            self._seen.add(key)
            self._validation_list.append(problem)
            self._found_at = self._scanned

    def _coprime_stride(self) -> int:
        stride = max(1, self._total * 618_033_988 // 10**9)
        while math.gcd(stride, self._total) != 1:
            stride += 1
        return stride


class OperandSplits(DrawnSplits):
    """Operands of arithmetic problems.

    ``digits`` gives the number of decimal digits of each operand (no leading zeros). Sets that
    differ only in order count as the same: ``12*34`` held out keeps ``34*12`` out of train as well.
    """

    def __init__(self, digits: Sequence[int], seed: int) -> None:
        lows = [10 ** (d - 1) for d in digits]
        super().__init__(
            [9 * low for low in lows],
            seed,
            lambda draws: tuple(low + draw for low, draw in zip(lows, draws, strict=True)),
            same=lambda operands: tuple(sorted(operands)),
        )
