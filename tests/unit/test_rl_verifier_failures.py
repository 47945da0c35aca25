"""Verifiers that fail: told with the first text, on all ranks, and the end of a run that has no
rewards."""

from __future__ import annotations

import pytest

from megatron_occ.observe.progress import Timers
from megatron_occ.rl.failures import Failures
from megatron_occ.rl.rewards import VerifierResult
from tests.unit.fake_layouts import FakeLayout, run_ranks
from tests.unit.fakes import FakeActor, ScriptedActor
from tests.unit.rl_setup import (
    DYNAMIC,
    four_updates,
    in_turn,
    make_source,
    rl_config,
    weights,
)

OK = VerifierResult(1.0, "ok")
LATE = VerifierResult(0.0, "timeout", "no answer within 5 s")


def error(text):
    return VerifierResult(0.0, "error", text)


def test_counts_and_the_first_text_of_results():
    results = [OK, LATE, error("KeyError: 'm'"), OK, error("KeyError: 'kg'"), LATE, LATE]
    found = Failures.of(["unit"] * 7, results)
    assert found == Failures(7, 2, 3, "verifier 'unit': KeyError: 'm'")
    assert Failures.of(["unit"] * 2, [OK, LATE]) == Failures(2, 0, 1, "")
    total = Failures()
    for part in (Failures(4), found, Failures(2, 1, 0, "a later one")):
        total.add(part)
    assert total == Failures(13, 3, 3, "verifier 'unit': KeyError: 'm'")


@pytest.mark.parametrize(
    ("results", "stops"),
    [
        ([error("e")] * 3, True),
        ([error("e"), LATE], False),
        ([error("e"), VerifierResult(0.0, "ok")], False),
        ([LATE] * 2, False),
        ([], False),
    ],
)
def test_only_errors_everywhere_stop_the_run(results, stops):
    failures = Failures.of(["unit"] * len(results), results)
    if not stops:
        failures.check()
        return
    with pytest.raises(ValueError, match=r"all 3 failed .* verifier 'unit': e\. A verifier takes"):
        failures.check()


def test_an_event_is_written_for_errors_and_not_for_what_is_late():
    assert Failures(8, 0, 3).events() == []
    assert Failures(8, 2, 0, "verifier 'unit': KeyError: 'm'").events() == [
        "2 of 8 responses scored 0 because their verifier failed, the first in verifier 'unit': "
        "KeyError: 'm'"
    ]


@pytest.mark.parametrize("text", ["caf\u00e9 \ud800 " + "\u00e9" * 3000, "plain"])
def test_every_rank_knows_the_failures_of_all_and_the_first_text(text):
    def work(layout):
        here = [OK, LATE] if layout.data_parallel_rank == 0 else [error(text), error("other")]
        return Failures.of(["unit"] * 2, here).over_ranks(layout)

    first, *others = run_ranks(3, work)
    assert others == [first] * 2
    assert (first.scored, first.errors, first.timeouts) == (6, 4, 1)
    assert first.first.startswith("verifier 'unit': " + text[:4])
    if text == "plain":
        assert first.first == "verifier 'unit': plain"


def test_a_rank_that_did_not_ask_takes_what_the_main_rank_of_its_share_knows():
    class SecondOfTwo(FakeLayout):
        is_model_parallel_main = False

        def broadcast_model_parallel(self, values):
            return values.fill_(ord("x")) if len(values) > 3 else values.fill_(2)

    found = Failures().over_ranks(SecondOfTwo())
    assert (found.scored, found.errors, found.timeouts) == (2, 2, 2)
    assert set(found.first) == {"x"}


@pytest.mark.parametrize(("result", "where"), [(error("e"), "errors"), (LATE, "timeouts")])
def test_failures_in_a_steps_own_rollouts_are_logged(result, where):
    """Four of sixteen; a validation asks the verifiers too, and is not counted."""
    texts = in_turn(lambda prompt: ["a.", "b.", "a.", "a."])
    source = make_source(
        rl_config(), ScriptedActor(texts), lambda text, _: result if "b" in text else 1.0
    )
    source.sampler.verifiers.score([("letters", "b.", "")] * 5)
    rollouts = source.generate(Timers())
    counts = {"errors": 0, "timeouts": 0} | {where: 4}
    assert {name: rollouts.metrics[f"verifier/{name}"] for name in counts} == counts
    assert rollouts.metrics["verifier/failed"] == 0.25
    assert len(rollouts.events) == (where == "errors")


def test_failures_are_counted_over_all_ranks():
    texts = in_turn(lambda prompt: ["a.", "b."] if prompt in "ab" else ["a."])

    def work(layout):
        source = make_source(
            rl_config(),
            ScriptedActor(texts, layout=layout),
            lambda t, _: error("e") if "b" in t else 1,
        )
        return source.generate(Timers())

    for rollouts in run_ranks(2, work):
        assert rollouts.metrics["verifier/errors"] == 4
        assert rollouts.events[0].startswith("4 of 16 responses scored 0")


def test_a_step_without_a_single_score_stops_the_run_before_it_trains():
    trainer, actor = four_updates("rl.steps=3")
    before = weights(actor)
    trainer.rollouts.sampler.verifiers.function = lambda *_: error("TypeError: f() takes 1")
    with pytest.raises(ValueError, match="all 16 failed") as stopped:
        trainer.fit()
    for part in ("verifier 'letters': TypeError: f() takes 1", "data.verifiers", "--resume"):
        assert part in str(stopped.value)
    assert trainer.step == 0
    assert all(value.equal(before[name]) for name, value in weights(actor).items())


def test_dynamic_sampling_does_not_draw_again_for_a_broken_verifier():
    actor = FakeActor()
    source = make_source(rl_config(*DYNAMIC), actor, lambda *_: error("e"))
    with pytest.raises(ValueError, match="all 16 failed"):
        source.generate(Timers())
    assert len(actor.calls) == 1


def broken_for_bb(response, answer):
    return error("e") if "bb" in response else float("a" in response)


@pytest.mark.parametrize(
    ("setting", "advantages", "tokens"),
    [
        # scores 1, 0, 0, 0 around 1/4
        ("false", [0.75, -0.25, -0.25, -0.25], [2, 2, 3, 2]),
        # 1, 0, 0 around 1/3, and the third response says nothing
        ("true", [2 / 3, -1 / 3, 0.0, -1 / 3], [2, 2, 0, 2]),
    ],
)
def test_a_response_without_a_score_is_left_out_by_choice(setting, advantages, tokens):
    actor = ScriptedActor(in_turn(lambda prompt: ["a.", "b.", "bb.", "b."]))
    config = rl_config("rl.advantage.normalize=false", f"rl.advantage.without_failures={setting}")
    batch = make_source(config, actor, broken_for_bb).generate(Timers()).batch
    assert batch.advantages.tolist() == pytest.approx(advantages * 4)
    assert batch.response_mask.sum(1).tolist() == tokens * 4


def test_a_group_of_failures_and_equal_scores_has_no_spread():
    """Else a failure's 0 beside right answers would be a difference."""
    actor = ScriptedActor(in_turn(lambda prompt: ["a.", "abb."]))
    config = rl_config(*DYNAMIC, "rl.advantage.without_failures=true")
    rollouts = make_source(config, actor, broken_for_bb).generate(Timers())
    assert "4 groups without spread kept" in rollouts.events[-1]
    assert not rollouts.batch.advantages.any()
