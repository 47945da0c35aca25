"""Malformed answers are refused with URL and field."""

from __future__ import annotations

import pytest

from megatron_occ.rollout.engine import EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote.checks import Field
from megatron_occ.rollout.remote.http import Client, TransportError
from megatron_occ.rollout.remote.server import finished
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.sglang import SglangServer
from megatron_occ.rollout.remote.vllm import VllmServer
from tests.unit.fake_servers import EOS, VOCAB, FakeSglang, FakeVllm

REQUEST, SAMPLING = Request([2, 3], seed=5), SamplingSettings(1.0, 6, stop_ids=(EOS,))


def ask(fake, kind, fault, tmp_path):
    settings = RemoteSettings("vllm", (fake.url,), tmp_path, VOCAB)
    server = kind(Client(fake.url, 5.0, 10**6), settings)
    server.inspect()
    fake.faults = [fault]
    try:
        return server.sample(REQUEST, SAMPLING)
    finally:
        fake.close()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("short", r"field choices\[0\]\.logprobs\.token_logprobs: wanted \d entries"),
        ("missing", r"field choices\[0\]\.token_ids: .*missing"),
        ("vocabulary", r"field choices\[0\]\.token_ids\[0\]: .*from 0 to 15, got 16"),
        ("negative", r"field choices\[0\]\.token_ids\[0\]: .* got -1"),
        ("boolean", r"field choices\[0\]\.token_ids\[0\]: .* got True"),
        ("nan", r"token_logprobs\[0\]: wanted a finite log-prob"),
        ("positive", r"token_logprobs\[0\]: wanted a finite log-prob, at most 0, got 0\.5"),
        ("reason", r"field choices\[0\]\.finish_reason: wanted stop or length, got 'tired'"),
        ("aborted", "the server aborted the request"),
    ],
)
def test_vllm(tmp_path, fault, says):
    fake = FakeVllm()
    with pytest.raises(TransportError, match=says) as caught:
        ask(fake, VllmServer, fault, tmp_path)
    assert caught.value.retry and str(caught.value).startswith(f"{fake.url}/v1/completions: ")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("short", r"field meta_info\.output_token_logprobs: wanted \d entries"),
        ("missing", r"field meta_info\.output_token_logprobs: .*missing"),
        ("other", r"field meta_info\.output_token_logprobs\[0\]\[1\]: wanted a whole number"),
    ],
)
def test_sglang(tmp_path, fault, says):
    fake = FakeSglang()
    with pytest.raises(TransportError, match=says) as caught:
        ask(fake, SglangServer, fault, tmp_path)
    assert caught.value.retry and str(caught.value).startswith(f"{fake.url}/generate: ")


def test_nothing_else_is_refused(tmp_path):
    for fake, kind in ((FakeVllm(), VllmServer), (FakeSglang(), SglangServer)):
        assert ask(fake, kind, "", tmp_path).tokens


@pytest.mark.parametrize(
    ("reason", "tokens", "retry", "says"),
    [
        ("length", [2] * 5, False, "cut at 5 of 6 tokens: raise the context length"),
        ("length", [2] * 7, True, "7 tokens, asked for 1 to 6"),
        ("stop", [], True, "0 tokens"),
        ("length", [2, EOS, 2, 2, 2, 2], True, "tokens follow a stop token"),
        ("stop", [2, 4], False, "ended after 2 of 6 tokens with token 4, which is none of"),
    ],
)
def test_reason_and_tokens_agree(reason, tokens, retry, says):
    with pytest.raises(EngineError, match=says) as caught:
        finished(Field(reason, "http://a", "reason"), tokens, REQUEST, SAMPLING)
    assert isinstance(caught.value, TransportError) is retry


def test_a_stop_token_at_the_limit_is_a_stop():
    tokens = [2, 2, 2, 2, 2, EOS]
    assert finished(Field("length", "http://a"), tokens, REQUEST, SAMPLING) == "stop"
    stopping = SamplingSettings(1.0, 6, stop_strings=("x",))
    assert finished(Field("stop", "http://a"), [2, 4], REQUEST, stopping) == "stop"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"server": "tgi"}, "unknown server"),
        ({"urls": ()}, "name each server once"),
        ({"urls": ("http://a", "http://a")}, "name each server once"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"weights_dir": "weights"}, "absolute path"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, change, says):
    good = {"server": "vllm", "urls": ("http://a",), "weights_dir": tmp_path, "vocab_size": 4}
    RemoteSettings(**good)
    with pytest.raises(EngineError, match=says):
        RemoteSettings(**{**good, **change})
