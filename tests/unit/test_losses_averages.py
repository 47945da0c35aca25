"""Exponential averages against sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses.averages import ExponentialAverage


def written_out(samples, decay):
    """Mean and standard error from explicit weights."""
    weights = [decay ** (len(samples) - 1 - i) for i in range(len(samples))]
    total = sum(weights)
    mean = sum(w * x for w, x in zip(weights, samples, strict=True)) / total
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, samples, strict=True)) / total
    count = total**2 / sum(w * w for w in weights)
    return mean, math.sqrt(variance / (count - 1)), count


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_mean_error_and_count_equal_the_weighted_sums(decay):
    samples = [3.0, -1.0, 0.5, 2.0, 7.0]
    average = ExponentialAverage((1,), decay)
    for sample in samples:
        average.update(torch.tensor([sample]))
    mean, error, count = written_out(samples, decay)
    assert average.mean.item() == pytest.approx(mean, rel=1e-12)
    assert average.error.item() == pytest.approx(error, rel=1e-12)
    assert average.count == pytest.approx(count, rel=1e-12)


def test_equal_weights_give_the_textbook_standard_error():
    average = ExponentialAverage((1,), 1.0)
    for sample in (1.0, 2.0, 6.0):
        average.update(torch.tensor([sample]))
    # mean 3, sample variance (4 + 1 + 9) / 2 = 7
    assert average.mean.item() == 3.0
    assert average.error.item() == pytest.approx(math.sqrt(7 / 3))


def test_one_sample_has_no_error_yet_and_none_no_mean():
    average = ExponentialAverage((2,), 0.9)
    assert average.mean.tolist() == [0, 0] and average.count == 0
    average.update(torch.tensor([4.0, -2.0]))
    assert average.mean.tolist() == [4.0, -2.0]
    assert average.error.tolist() == [math.inf, math.inf]


def test_without_a_past_only_the_last_sample_counts():
    average = ExponentialAverage((1,), 0.0)
    for sample in (5.0, 3.0):
        average.update(torch.tensor([sample]))
    assert average.mean.item() == 3.0 and average.error.item() == math.inf


def test_state_goes_on_bit_for_bit_and_another_shape_is_refused():
    one, other = ExponentialAverage((2,), 0.9), ExponentialAverage((2,), 0.9)
    for sample in ([1.0, 2.0], [0.3, -1.0]):
        one.update(torch.tensor(sample))
    other.load_state_dict(one.state_dict())
    for average in (one, other):
        average.update(torch.tensor([0.1, 0.7]))
    assert torch.equal(one.mean, other.mean) and torch.equal(one.error, other.error)
    with pytest.raises(ValueError, match=r"samples \[2\], expected \[3\]"):
        ExponentialAverage((3,), 0.9).load_state_dict(one.state_dict())


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        ExponentialAverage((1,), 1.5)
