"""Numbers in sentences."""

from __future__ import annotations

import pytest

from megatron_occ.config.words import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "MTP layer", "0 MTP layers"),
        (1, "MTP layer", "1 MTP layer"),
        (2, "micro-batch", "2 micro-batches"),
        (1, "micro-batch", "1 micro-batch"),
        (1234567, "loss", "1,234,567 losses"),
    ],
)
def test_a_noun_follows_its_number(number, noun, text):
    assert counted(number, noun) == text
