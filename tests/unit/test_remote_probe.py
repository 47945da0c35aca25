"""The probe: old and partial weights, an old drafter, and wrong sampling are noticed."""

from __future__ import annotations

import math

import pytest

from megatron_occ.rollout.engine import EngineError
from megatron_occ.rollout.remote.checks import Field
from megatron_occ.rollout.remote.http import Client
from megatron_occ.rollout.remote.probe import Probe, Prober, likeliest_z
from megatron_occ.rollout.remote.server import Answer
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.sglang import _accepted
from megatron_occ.rollout.remote.vllm import VllmServer
from tests.unit.fake_servers import FakeVllm, export, score
from tests.unit.test_remote_engine import KINDS, fleet


class Scorer:
    """A server that only scores: fixed log-probs."""

    def __init__(self, values):
        self.client, self.values, self.speculative_tokens = Client("http://a", 1, 1), values, 0

    def score(self, tokens):
        return list(self.values)


def prober(reference, tmp_path, **options):
    settings = RemoteSettings("vllm", ("http://a",), tmp_path, 16, **options)
    return Prober(Probe([list(range(len(reference) + 1))], lambda _: [list(reference)]), settings)


@pytest.mark.parametrize("kind", KINDS)
def test_old_weights_of_the_trunk_are_refused_with_figures(tmp_path, kind):
    with fleet(tmp_path, kind) as (engine, (server,), weights):
        weights["trunk"], server.takes = 8, ("head",)
        with pytest.raises(EngineError, match=rf"{server.url} serves old .* by \d\.\d+ on average"):
            engine.update_weights(2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_drafter_is_refused(tmp_path, kind):
    with fleet(tmp_path, kind, speculative=True) as (engine, (server,), weights):
        assert engine.reports[server.url].acceptance == 1.0
        weights.update(trunk=8, head=8)
        server.takes = ("trunk",)
        with pytest.raises(EngineError, match=r"old weights of the head: \d+ of \d+ drafted"):
            engine.update_weights(2)


def test_a_head_that_is_one_update_old_is_refused(tmp_path):
    # it drafts as well as before
    with fleet(tmp_path, speculative=True, trainer_tells=True) as (engine, (server,), weights):
        weights["head"], server.takes = 23, ("trunk",)
        with pytest.raises(EngineError, match=r"head has changed since .* server's has not"):
            engine.update_weights(2)


def test_heads_that_follow_pass(tmp_path):
    options = {"draft_share": 0.0}
    opened = fleet(tmp_path, speculative=True, trainer_tells=True, options=options)
    with opened as (engine, (server,), weights):
        for version, (trunk, head) in enumerate(((7, 7), (7, 8), (8, 8), (8, 7)), start=2):
            weights.update(trunk=trunk, head=head)
            engine.update_weights(version)
            assert server.head == head


def test_an_old_drafter_passes_where_the_check_is_off(tmp_path):
    options = {"draft_share": 0.0}
    with fleet(tmp_path, speculative=True, options=options) as (engine, (server,), weights):
        weights.update(trunk=8, head=8)
        server.takes = ("trunk",)
        engine.update_weights(2)


def test_both_updated_passes(tmp_path):
    with fleet(tmp_path, speculative=True, count=2) as (engine, servers, weights):
        weights.update(trunk=8, head=8)
        engine.update_weights(2)
        for server in servers:
            report = engine.reports[server.url]
            assert report.gap_max < 1e-9
            assert report.followed == pytest.approx(1.0)
            assert report.acceptance == 1.0


def test_the_gap_is_mean_and_largest(tmp_path):
    one = prober([-1.0, -2.0, -3.0, -4.0], tmp_path)
    one.begin()
    mean, largest, followed = one.check_logprobs(Scorer([-1.0, -2.1, -3.0, -4.06]))
    assert (mean, largest, followed) == (pytest.approx(0.04), pytest.approx(0.1), None)
    with pytest.raises(EngineError, match=r"by 0\.06 on average and 0\.2 at most"):
        one.check_logprobs(Scorer([-1.0, -2.2, -3.0, -4.04]))
    one = prober([-1.0, -2.0], tmp_path, gap_mean=1.0, gap_max=0.2)
    one.begin()
    with pytest.raises(EngineError, match=r"0\.3 at most"):
        one.check_logprobs(Scorer([-1.0, -2.3]))


def moving(tmp_path, first, second, answers):
    """What the probe says at the second version; servers' rounding errors are part of answers."""
    one = prober(first, tmp_path)
    one.begin()
    one.check_logprobs(Scorer(answers[0]))
    one._probe = Probe(one._probe.sequences, lambda _: [second])
    one.begin()
    return one.check_logprobs(Scorer(answers[1]))[2]


def test_an_update_smaller_than_the_tolerance_is_told_from_none(tmp_path):
    old, new = [-1.0, -2.0, -3.0], [-1.004, -2.0, -2.998]
    noise = [0.01, -0.02, 0.01]
    rounded = [a + b for a, b in zip(old, noise, strict=True)]
    after = [a + b for a, b in zip(new, noise, strict=True)]
    assert moving(tmp_path, old, new, (rounded, after)) == pytest.approx(1.0)
    with pytest.raises(EngineError, match=r"moved by up to 0\.004 .* not at all"):
        moving(tmp_path, old, new, (rounded, rounded))


def test_a_part_of_the_movement_is_partial_weights(tmp_path):
    old, new = [-1.0, -2.0, -3.0], [-1.04, -2.0, -2.98]
    half = [-1.01, -2.0, -2.995]
    with pytest.raises(EngineError, match=r"followed 0\.25 of"):
        moving(tmp_path, old, new, (old, half))


def test_movement_below_rounding_is_not_judged(tmp_path):
    old, new = [-1.0, -2.0], [-1.0005, -2.0]
    assert moving(tmp_path, old, new, (old, old)) is None


def test_a_server_that_does_not_sample_its_logprobs_is_refused(tmp_path):
    options = {"sampling_z": 5.0}
    with fleet(tmp_path, options=options) as (engine, (server,), _):
        assert abs(engine.reports[server.url].sampling_z) < 4
    with (
        pytest.raises(EngineError, match=r"likeliest token is drawn less often .* by \d+\.\d"),
        fleet(tmp_path, options=options, biased=True),
    ):
        pass


def test_a_server_that_ignores_seeds_is_refused(tmp_path):
    options = {"sampling_z": 5.0}
    with (
        pytest.raises(EngineError, match=r"ignores seeds: \d of 8 responses"),
        fleet(tmp_path, options=options, seeded=False),
    ):
        pass
    with fleet(tmp_path, options={**options, "require_seeds": False}, seeded=False):
        pass


def test_z_by_hand():
    half, sure = math.log(0.5), 0.0
    # two draws at p = 1/2, both the likeliest; a certain token adds nothing
    answers = [
        Answer([1, 1], [half, sure], "stop", [half, sure]),
        Answer([1], [half], "stop", [half]),
    ]
    assert likeliest_z(answers) == pytest.approx((2 - 1) / math.sqrt(2 * 0.25))


@pytest.mark.parametrize("rows", [[[-1.0]], [[-1.0, -2.0, -3.0]], [[math.nan, -1.0]], []])
def test_a_reference_of_another_shape_is_refused(tmp_path, rows):
    settings = RemoteSettings("vllm", ("http://a",), tmp_path, 16)
    with pytest.raises(EngineError, match="reference"):
        Prober(Probe([[1, 2, 3]], lambda _: rows), settings).begin()


def test_expected_acceptance_is_the_trainers(tmp_path):
    fake = FakeVllm(speculative=True)
    settings = RemoteSettings("vllm", (fake.url,), tmp_path, 16, sampling_z=0.0)
    server = VllmServer(Client(fake.url, 5.0, 10**6), settings)
    server.inspect()
    export(3, 8)(tmp_path)  # the head of other weights: right for 121 of 379 drafts
    server._post("/pause")
    server._reload(tmp_path)
    share = {"wanted": 0.0}
    material = Probe(
        [[1, 2, 3]],
        lambda asked: [score(3, tokens) for tokens in asked],
        draft_prompts=[[prompt] for prompt in range(16)],
        expected_acceptance=lambda: share["wanted"],
    )
    one = Prober(material, settings)
    one.begin()
    assert one.check(server).acceptance == 121 / 379
    share["wanted"] = 0.99
    with pytest.raises(EngineError, match=r"the trainer's is 0\.990"):
        one.check(server)
    fake.close()


def test_sglang_counts_by_position():
    # 5 passes accepted nothing, 3 one draft, 2 both
    meta = Field({"spec_verify_ct": 10, "spec_accept_histogram": [5, 3, 2]}, "http://a")
    assert _accepted(meta, 10, 2) == [5, 2]
    assert _accepted(Field({"spec_accepted_drafts": 4}, "http://a"), 10, 1) == [4]
