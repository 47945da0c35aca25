"""Stop strings: a server with another tokenizer is refused, differences at the edges are told."""

from __future__ import annotations

import re

import pytest

from megatron_occ.rollout.engine import EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote.server import Answer
from megatron_occ.rollout.remote.stops import check_stops
from tests.unit.test_remote_engine import fleet

SAMPLING = SamplingSettings(1.0, 8, stop_ids=(1,), stop_strings=("bc",))


def decode(tokens):
    """2: a, 3: b, ..."""
    return "".join(chr(95 + token) for token in tokens)


def answer(text, reason):
    return Answer([ord(letter) - 95 for letter in text], [-1.0] * len(text), reason)


CUT, COMPLETE, BY_ID = answer("acd", "stop"), answer("abc", "stop"), answer("dd`", "stop")
LONG, MISSED, LAST = (answer(text, "length") for text in ("dddd", "abcd", "ddbc"))


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([COMPLETE, BY_ID, LONG, None], None),
        ([LAST, COMPLETE], None),
        ([COMPLETE, COMPLETE, COMPLETE, CUT], "1 of 4 .* 1 were cut at none of .* 0 went on"),
        ([COMPLETE, MISSED], "1 of 2 .* 0 were cut at none of .* 1 went on"),
    ],
)
def test_differences_are_told(answers, told):
    lines = check_stops(answers, SAMPLING, decode)
    assert len(lines) == (told is not None)
    if told:
        assert re.search(told, lines[0])


@pytest.mark.parametrize("answers", [[CUT], [MISSED], [CUT, MISSED, COMPLETE, LONG, BY_ID]])
def test_another_tokenizer_is_refused(answers):
    with pytest.raises(EngineError, match=r"another tokenizer: start them with .* stop at ids"):
        check_stops(answers, SAMPLING, decode)
    assert check_stops(answers, SamplingSettings(1.0, 8, stop_ids=(1,)), decode) == []


def test_the_engine_looks(tmp_path):
    sampling = SamplingSettings(1.0, 12, stop_strings=("zz",))
    with fleet(tmp_path, decode=decode) as (engine, (server,), _):
        assert engine.generate([Request([2], 5)], sampling).events == []
        server.faults = ["cut"]
        with pytest.raises(EngineError, match="1 of 1 responses with a stop string"):
            engine.generate([Request([3], 5)], sampling)
