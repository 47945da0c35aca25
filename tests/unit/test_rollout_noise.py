"""Random numbers of tokens, against SplitMix64 in Python's integers."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.data.splits import mix64
from megatron_occ.rollout import row_keys, token_keys, uniforms

GAMMA = 0x9E3779B97F4A7C15


def expected(seed, position, count):
    """The generator that starts at a key gives mix64(key), mix64(key + gamma) ..."""
    key = mix64(mix64(seed) + position * GAMMA)
    return [((mix64(key + n * GAMMA) >> 12) + 0.5) * 2.0**-52 for n in range(count)]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_numbers_are_those_of_splitmix64(seed):
    keys = token_keys(row_keys([7, seed]), torch.tensor([[0, 5], [3, 10**6]]))
    found = uniforms(keys, 4)
    assert found.shape == (2, 2, 4)
    assert found[1].tolist() == [expected(seed, 3, 4), expected(seed, 10**6, 4)]
    assert found[0].tolist() == [expected(7, 0, 4), expected(7, 5, 4)]


def test_numbers_are_uniform():
    found = uniforms(token_keys(row_keys(range(20)), torch.arange(50)), 40).flatten()
    assert found.min() > 0
    assert found.max() < 1
    counts = torch.histc(found, bins=100, min=0, max=1)
    # 99 degrees of freedom: the 0.999 quantile of chi-square is 148.2
    assert float(((counts - 400) ** 2 / 400).sum()) < 148.2
    # 52 random bits, not the 24 of single precision
    assert (found * 2**30).frac().count_nonzero() > 39_000


def test_neighbours_are_independent():
    """Numbers of a token, of the next token and of the next seed."""
    found = uniforms(token_keys(row_keys(range(60)), torch.arange(60)), 60) - 0.5
    for dimension in range(3):
        one = found.narrow(dimension, 0, 59)
        other = found.narrow(dimension, 1, 59)
        correlation = float((one * other).mean() * 12)
        assert abs(correlation) < 4 / one.numel() ** 0.5


def test_a_row_depends_on_its_own_seed_only():
    places = torch.arange(5)
    alone, state = token_keys(row_keys([42]), places)[0], torch.get_rng_state()
    for seeds, row in (([42, 1, 2], 0), ([9, 42], 1), ([3, 2**63 - 1, 42, 42], 3)):
        assert torch.equal(token_keys(row_keys(seeds), places)[row], alone)
    assert not torch.equal(token_keys(row_keys([42 + 2**32]), places)[0], alone)
    assert torch.equal(torch.get_rng_state(), state)
