"""Rollouts that are ahead of training: the same prompts in the same order, older weights."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config import ConfigError, validate
from megatron_occ.config.warnings import rl_warnings
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.ages import Ages
from megatron_occ.rl.rollouts import Rollouts
from megatron_occ.rl.stopping import StopRequested
from megatron_occ.rollout.engine import Done
from tests.unit.fakes import TOKENIZER, FakeActor, ScriptedActor
from tests.unit.rl_setup import (
    DYNAMIC,
    four_updates,
    make_source,
    prompt_names,
    rl_config,
    spread_only_in,
)

STEPS = 5


def lagging(lag, *overrides):
    return rl_config(f"rl.async.max_lag={lag}", "rl.steps=5", *overrides)


def drawn(lag, actor, *overrides, update=lambda actor: None) -> list[Rollouts]:
    """The rollouts of five steps; ``update`` is what training does."""
    source, found = make_source(lagging(lag, *overrides), actor), []
    for step in range(STEPS):
        found.append(source.generate(Timers(), steps_left=STEPS - step))
        update(actor)
    assert not source._begun
    return found


def next_version(actor):
    actor.version += 2


@pytest.mark.parametrize("lag", [1, 2, 9])
def test_under_weights_that_stay_every_lag_draws_the_same(lag):
    whole, ahead = FakeActor(), FakeActor()
    for one, other in zip(drawn(0, whole), drawn(lag, ahead), strict=True):
        assert torch.equal(one.batch.ids, other.batch.ids)
        assert torch.equal(one.batch.rollout_logprobs, other.batch.rollout_logprobs)
        assert torch.equal(one.batch.advantages, other.batch.advantages)
    # nothing twice, nothing that no step trains on
    assert whole.calls == ahead.calls and len(ahead.calls) == STEPS


@pytest.mark.parametrize("lag", [1, 2])
def test_an_engine_in_the_training_processes_is_ahead_by_the_whole_lag(lag):
    found = [each.metrics for each in drawn(lag, FakeActor(), update=next_version)]
    expected = [min(step, lag) for step in range(STEPS)]
    assert [metrics["lag/mean"] for metrics in found] == expected
    assert [metrics["lag/max"] for metrics in found] == expected
    assert {metrics["lag/straddling"] for metrics in found} == {0.0}


def test_without_lag_there_is_none_to_tell():
    for rollouts in drawn(0, FakeActor(), update=next_version):
        assert not [name for name in rollouts.metrics if name.startswith("lag/")]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_dynamic_sampling_takes_the_same_groups_whatever_the_lag(lag):
    useful = {*prompt_names(1, 3), *prompt_names(9, 2), *prompt_names(14, 20)}
    source = make_source(lagging(lag, *DYNAMIC), ScriptedActor(spread_only_in(useful)))
    prompts, positions = [], []
    for step in range(3):
        rollouts = source.generate(Timers(), steps_left=3 - step)
        rows = zip(rollouts.batch.ids[::4], rollouts.batch.response_mask[::4], strict=True)
        prompts.append([TOKENIZER.decode(ids[: int(m.argmax())].tolist()) for ids, m in rows])
        positions.append(source.position)
    assert positions == [3, 5, 6]
    assert prompts[0] == [*prompt_names(1, 3), *prompt_names(9, 1)]
    assert prompts[1:] == [prompt_names(14, 4), prompt_names(20, 4)]


def test_a_run_that_goes_on_asks_again_for_what_was_under_way():
    actor = FakeActor()
    source = make_source(lagging(2), actor)
    for step in range(2):
        source.generate(Timers(), steps_left=STEPS - step)
    asked = len(actor.calls)
    assert (source.position, asked) == (2, 4)
    # as from a checkpoint: the position alone
    other = FakeActor()
    resumed = make_source(lagging(2), other)
    resumed.position = source.position
    for step in range(2, STEPS):
        resumed.generate(Timers(), steps_left=STEPS - step)
    assert other.calls[:2] == actor.calls[2:]
    prompts = [p for call in actor.calls[:2] + other.calls for p in call["prompts"][::4]]
    assert [TOKENIZER.decode(p) for p in prompts] == prompt_names(0, 4 * STEPS)


def test_a_step_that_is_stopped_gives_its_prompts_back():
    source = make_source(lagging(1), FakeActor())
    source.generate(Timers(), steps_left=5)

    def stop():
        raise StopRequested("SIGTERM")

    trainer, _ = four_updates("rl.async.max_lag=1")
    trainer.rollouts = source
    trainer._end_if_asked = stop
    with pytest.raises(StopRequested):
        trainer._rollouts()
    assert source.position == 1 and not source._begun


class InParts(FakeActor):
    """Half of each response comes under the weights that are served when it is asked for."""

    def submit(self, requests, sampling):
        generation = super().submit(requests, sampling).result()
        return Later(self, generation)


class Later(Done):
    def __init__(self, actor, generation):
        super().__init__(generation)
        object.__setattr__(self, "actor", actor)

    def result(self):
        for row in self.generation.versions:
            row[len(row) // 2 :] = [self.actor.version] * (len(row) - len(row) // 2)
        return self.generation


def test_responses_that_straddle_an_update_are_whole_and_counted():
    found = drawn(1, InParts(), update=next_version)
    assert [each.metrics["lag/max"] for each in found] == [0, 1, 1, 1, 1]
    for each in found[1:]:
        lengths = each.batch.response_mask.sum(1)
        halves = (lengths // 2).sum() / lengths.sum()
        assert each.metrics["lag/mean"] == pytest.approx(float(halves))
        assert each.metrics["lag/straddling"] == float((lengths > 1).double().mean())
        assert len(each.batch) == 16


def test_a_version_that_stays_is_not_old():
    ages = Ages()
    for version in (3, 5, 5, 5):
        ages.begin_step(version)
    assert ages.of([[3, 5], [5]]).sums == [3.0, 3.0, 1.0, 2.0]
    assert ages.of([]).largest == 0


def test_the_trainer_counts_tokens_a_second_over_the_whole_step():
    for lag in (0, 1):
        trainer, _ = four_updates(f"rl.async.max_lag={lag}", "rl.steps=2")
        trainer.fit()
        lines = [line for phase, _, line in trainer.recorder.lines if phase == "rl"]
        assert ("lag/mean" in lines[0]) == bool(lag)
        time = lines[1]["time/step" if lag else "time/rollout"]
        tokens = lines[1]["rollout/tokens_per_second"] * time
        assert tokens == pytest.approx(round(tokens), abs=1e-6)


def problems(*overrides):
    try:
        validate(rl_config("rl.async.max_lag=2", *overrides), command="rl")
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


def test_what_lag_makes_meaningless_is_refused():
    by_rollout = ("mtp.preset=occ", "rl.old_logprobs=rollout")
    assert "rl.async.max_lag=2: with rl.old_logprobs=rollout" in problems(*by_rollout)
    assert problems("mtp.preset=occ") == ""
    assert problems("mtp.preset=detach", "rl.old_logprobs=rollout") == ""
    states = ("mtp.preset=null", "mtp.head.signal=soft_ce", "mtp.head.states=rollout")
    assert "rl.async.max_lag=2: mtp.head.states=rollout" in problems(*states)


def test_a_lag_that_nothing_corrects_is_told():
    def told(*overrides):
        config = rl_config("rl.async.max_lag=2", "mtp.preset=detach", *overrides)
        return [text for text in rl_warnings(config) if text.startswith("rl.async.max_lag=2")]

    assert len(told()) == 1
    assert told("rl.old_logprobs=rollout") == []
    assert told("rl.correction.weights=token", "rl.correction.high=2") == []
    assert told("rl.train_trunk=false") == []
