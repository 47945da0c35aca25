"""What a rollout engine can be asked."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_occ.rollout import Request, SamplingSettings

SETTINGS = SamplingSettings(1.0, 8)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("temperature", -0.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("max_response_length", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_k", 0),
    ],
)
def test_settings_out_of_range_are_refused(name, wrong):
    with pytest.raises(ValueError, match=rf"^{name}={wrong}: give "):
        replace(SETTINGS, **{name: wrong})


@pytest.mark.parametrize("allowed", [{"temperature": 0}, {"top_p": 1e-9}, {"top_k": 1}])
def test_the_ends_of_the_ranges_are_allowed(allowed):
    assert replace(SETTINGS, **allowed) != SETTINGS


def test_a_request_needs_a_prompt_and_room_for_a_token():
    assert Request([3], 1, 1).max_response_length == 1
    with pytest.raises(ValueError, match=r"prompt=\[\]: has no token"):
        Request([], seed=1)
    with pytest.raises(ValueError, match="max_response_length=0: give at least 1, or None"):
        Request([3], seed=1, max_response_length=0)
