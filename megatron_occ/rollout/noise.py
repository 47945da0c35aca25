"""Random numbers that belong to a token of a response, whatever is computed around it.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): a key of
64 bits is the state of a generator, and its n-th number needs none of those before it. So the
numbers of any token are there when they are wanted, equal on every device, and nothing is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BITS, _DIGITS = 64, 52


def _signed(value: int) -> int:
    """64 bits as torch's int64 has them."""
    value %= 2**_BITS
    return value - 2**_BITS if value >= 2 ** (_BITS - 1) else value


_STEP = _signed(0x9E3779B97F4A7C15)
# shift, factor
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
_LAST_SHIFT = 31


def _shifted(values: Tensor, by: int) -> Tensor:
    """Zeros come in from the left, where int64 would repeat the sign."""
    return (values >> by).bitwise_and_((1 << (_BITS - by)) - 1)


def _mixed(values: Tensor) -> Tensor:
    """SplitMix64's output function, in place."""
    if values.device.type == "cpu":
        _mix_on_host(values.numpy().view(np.uint64))
        return values
    return _mix_on_device(values)


def _mix_on_device(values: Tensor) -> Tensor:
    for by, factor in _ROUNDS:
        values.bitwise_xor_(_shifted(values, by)).mul_(factor)
    return values.bitwise_xor_(_shifted(values, _LAST_SHIFT))


def _mix_on_host(values: np.ndarray) -> None:
    """The same: NumPy has 64 bits without a sign, and a call costs it half as much."""
    for by, factor in _ROUNDS:
        values ^= values >> np.uint64(by)
        values *= np.uint64(factor % 2**_BITS)
    values ^= values >> np.uint64(_LAST_SHIFT)


# kept for good: captured CUDA graphs read it where it lies
@functools.cache
def _steps(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device) * _STEP


def row_keys(seeds: Sequence[int]) -> Tensor:
    """Key of each response, [n] int64 on the CPU; 64 bits of a seed count."""
    return _mixed(torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64) + _STEP)


def token_keys(rows: Tensor, positions: Tensor) -> Tensor:
    """Key of each token of responses.

    Args:
        rows: [n] from :func:`row_keys`.
        positions: [n, q] in the response, from 0.

    Returns:
        [n, q] int64.
    """
    return _mixed((positions + 1) * _STEP + rows.unsqueeze(1))


def uniforms(keys: Tensor, count: int) -> Tensor:
    """Uniform numbers above 0 and below 1 of tokens, [..., count] fp64 with 52 random bits.

    Args:
        keys: [...] from :func:`token_keys`.
        count: numbers of each.
    """
    return _fractions(keys.unsqueeze(-1) + _steps(count, keys.device))


def uniforms_at(keys: Tensor, indices: Tensor) -> Tensor:
    """The numbers of :func:`uniforms` at some places alone.

    Args:
        keys: [...] from :func:`token_keys`.
        indices: [..., c] from 0.
    """
    return _fractions((indices + 1).mul_(_STEP).add_(keys.unsqueeze(-1)))


def _fractions(states: Tensor) -> Tensor:
    """Uniform numbers of a generator's states, which are overwritten."""
    digits = _shifted(_mixed(states), _BITS - _DIGITS)
    return digits.double().add_(0.5).mul_(2.0**-_DIGITS)
