"""Deterministic operands for generated problems, split into train and validation by a hash."""

from __future__ import annotations

import math
from collections.abc import Sequence

SPLITS = ("train", "validation")
# One operand set in ten is held out.
HELD_OUT_ONE_IN = 10
# Far more than a run draws, so that the train problems of two stream seeds do not overlap.
_PROBLEMS_PER_SEED = 1 << 40

_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# Not a setting: two runs with different seeds must agree on what is held out, or RL with one seed
# would validate on operands that pretraining with another seed has seen.
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


def is_held_out(operands: Sequence[int]) -> bool:
    """Whether a set of operands belongs to validation; their order does not matter."""
    state = _SPLIT_SALT
    for operand in sorted(operands):
        state = mix64(state ^ operand)
    return state % HELD_OUT_ONE_IN == 0


class OperandSplits:
    """Operand tuples by (seed, split, index), whatever was asked for before.

    ``digits`` gives the number of decimal digits of each operand (no leading zeros). "train" is an
    endless stream drawn with replacement, different for each seed. "validation" is one fixed list
    of distinct operand sets, the same for every seed, so that runs are compared on the same
    problems. Sets that differ only in order count as the same: ``12*34`` held out keeps ``34*12``
    out of train as well.
    """

    def __init__(self, digits: Sequence[int], seed: int) -> None:
        self._ranges = [(10 ** (d - 1), 9 * 10 ** (d - 1)) for d in digits]
        self._key = mix64(seed)
        self._total = math.prod(span for _, span in self._ranges)
        self._stride = self._coprime_stride()
        # Memo of the validation list. It only grows, and its content depends on nothing but
        # `digits`, so that it is not visible to the caller.
        self._validation_list: list[tuple[int, ...]] = []
        self._seen: set[tuple[int, ...]] = set()
        self._scanned = 0

    def operands(self, split: str, index: int) -> tuple[int, ...]:
        """Operands of problem ``index`` (0-based) of a split.

        Raises ValueError for an unknown split, a negative index, or an index past the end of the
        validation split.
        """
        check_split(split)
        if index < 0:
            raise ValueError(f"problem index {index} is negative: indices start at 0")
        return self._train(index) if split == "train" else self._validation(index)

    def _train(self, index: int) -> tuple[int, ...]:
        state = mix64(self._key + index)
        while True:
            values = []
            for low, span in self._ranges:
                state = mix64(state)
                values.append(low + state % span)
            if not is_held_out(values):
                return tuple(values)

    def _validation(self, index: int) -> tuple[int, ...]:
        while len(self._validation_list) <= index:
            if self._scanned == self._total:
                raise ValueError(
                    f"validation problem {index} does not exist: these operands give only "
                    f"{len(self._validation_list)} held-out problems; ask for fewer, or use more "
                    "digits"
                )
            self._scan_one()
        return self._validation_list[index]

    def _scan_one(self) -> None:
        # A stride without a common factor visits every operand tuple once, in a spread-out order.
        position = self._scanned * self._stride % self._total
        self._scanned += 1
        values = []
        for low, span in self._ranges:
            position, offset = divmod(position, span)
            values.append(low + offset)
        key = tuple(sorted(values))
        if is_held_out(values) and key not in self._seen:
            self._seen.add(key)
            self._validation_list.append(tuple(values))

    def _coprime_stride(self) -> int:
        stride = max(1, self._total * 618_033_988 // 10**9)
        while math.gcd(stride, self._total) != 1:
            stride += 1
        return stride
