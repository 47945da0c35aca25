"""From prompts to a batch, and dynamic sampling, with scripted responses."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pytest
import torch

from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.sampler import sample_seed
from megatron_occ.rollout import SamplingSettings
from tests.unit.fakes import STOP_IDS, TOKENIZER, FakeActor, ScriptedActor
from tests.unit.rl_setup import (
    DYNAMIC,
    LetterTask,
    in_turn,
    make_source,
    prompt_names,
    rl_config,
    spread_only_in,
)


def rows_as_text(batch):
    return [TOKENIZER.decode(row) for row in batch.ids.tolist()]


def test_a_step_draws_each_prompt_samples_per_prompt_times():
    actor = FakeActor()
    rollouts = make_source(rl_config(), actor).generate(Timers())
    (call,) = actor.calls
    expected = [TOKENIZER.encode(name) for name in prompt_names(0, 4) for _ in range(4)]
    assert call["prompts"] == expected
    assert len(set(call["seeds"])) == 16
    assert len(rollouts.batch) == 16
    assert [row[0] for row in rollouts.batch.ids.tolist()] == [row[0] for row in expected]


def test_batch_advantages_metrics_and_readable_samples_by_hand():
    """Group of prompt a: three of four right; other groups: all wrong."""
    config = rl_config("rl.rollout.log_samples=3", "rl.rollout.temperature=0.7")
    texts = {"a": ["a.", "ba.", "a", "b."]}
    actor = ScriptedActor(in_turn(lambda prompt: texts.get(prompt, ["bbbbbbbb"])))
    rollouts = make_source(config, actor).generate(Timers())
    assert actor.calls[0]["temperature"] == 0.7
    # mean 3/4, sample standard deviation 1/2, epsilon 1e-6
    expected = torch.tensor([0.25, 0.25, 0.25, -0.75] + [0.0] * 12) / (0.5 + 1e-6)
    torch.testing.assert_close(rollouts.batch.advantages, expected)
    assert rows_as_text(rollouts.batch)[:5] == ["aa.", "aba.", "aa", "ab.", "bbbbbbb"]
    # responses are cut at 6 tokens; lengths 2, 3, 1, 2 and twelve times 6
    assert rollouts.batch.ids.shape == (16, 7)
    assert rollouts.batch.response_mask.sum(1).tolist() == [2, 3, 1, 2] + [6] * 12
    assert torch.equal(rollouts.batch.rollout_logprobs, -rollouts.batch.response_mask)
    assert rollouts.metrics == pytest.approx(
        {
            "reward/mean": 3 / 16,
            "reward/std": (3 / 16 * 13 / 16) ** 0.5,
            "rollout/accuracy": 3 / 16,
            "rollout/length_mean": 80 / 16,
            "rollout/length_max": 6,
            "rollout/truncated": 13 / 16,  # "a" and the twelve long ones
            "rollout/dropped_groups": 0,
            "rollout/tokens": 80,
            "verifier/errors": 0,
            "verifier/timeouts": 0,
            "verifier/failed": 0,
            "draft/acceptance_length": 1,
        }
    )
    assert rollouts.events == []
    # every fifth of sixteen responses
    assert [sample["prompt"] for sample in rollouts.samples] == ["a", "b", "c"]
    first = {k: rollouts.samples[0][k] for k in ("response", "answer", "reward", "advantage")}
    assert first == {"response": "a.", "answer": "a", "reward": 1.0, "advantage": 0.499999}
    reasons = [sample["finish_reason"] for sample in rollouts.samples]
    assert reasons == ["stop", "length", "length"]


def test_no_samples_are_kept_where_none_are_wanted():
    source = make_source(rl_config("rl.rollout.log_samples=0"), FakeActor())
    assert source.generate(Timers()).samples == []


def test_dr_grpo_advantages_reach_the_batch():
    actor = ScriptedActor(in_turn(lambda prompt: ["a.", "b."]))
    source = make_source(rl_config("rl.advantage.normalize=false"), actor)
    assert source.generate(Timers()).batch.advantages.tolist() == [0.5, -0.5] * 8


def test_responses_that_were_cut_off_train_nothing_and_count_in_the_baseline():
    config = rl_config("rl.overlong.leave_out=true", "rl.advantage.normalize=false")
    actor = ScriptedActor(in_turn(lambda prompt: ["a.", "bbbbbbbb"]))
    batch = make_source(config, actor).generate(Timers()).batch
    # limit 6: the second response of each pair is cut off
    assert batch.response_mask.sum(1).tolist() == [2, 0] * 8
    assert batch.advantages.tolist() == [0.5, -0.5] * 8


def test_advantages_normalised_over_the_step_reach_the_batch():
    """One group with a right answer in four, the others without."""
    texts = {"a": ["a.", "b.", "b.", "b."]}
    actor = ScriptedActor(in_turn(lambda prompt: texts.get(prompt, ["b."])))
    config = rl_config("rl.algorithm=reinforce_pp")
    found = make_source(config, actor).generate(Timers()).batch.advantages
    rewards = [1.0] + [0.0] * 15
    deviation = statistics.stdev(rewards) + 1e-6
    expected = torch.tensor([(reward - 1 / 16) / deviation for reward in rewards])
    torch.testing.assert_close(found, expected)


def test_overlong_penalty_enters_the_reward_and_not_the_accuracy():
    """Limit 6, buffer 4: no penalty up to 2 tokens, then a quarter of 0.8 for each more."""
    config = rl_config(
        "rl.overlong.buffer=4", "rl.overlong.penalty=0.8", "rl.advantage.normalize=false"
    )
    actor = ScriptedActor(in_turn(lambda prompt: ["a.", "bb.", "bbbbb.", "ab"]))
    rollouts = make_source(config, actor).generate(Timers())
    rewards = [1.0, -0.2, -0.8, 1.0]
    assert rollouts.metrics["reward/mean"] == pytest.approx(0.25)
    assert rollouts.metrics["rollout/accuracy"] == 0.5
    expected = torch.tensor(rewards * 4) - 0.25
    torch.testing.assert_close(rollouts.batch.advantages, expected)
    assert [sample["reward"] for sample in rollouts.samples[:2]] == pytest.approx([1.0, -0.8])


def test_partial_credit_is_reward_and_not_accuracy():
    """Right are scores of 1 and more: a quarter, half, and two of four."""
    actor = ScriptedActor(in_turn(lambda prompt: ["b.", "bb.", "a.", "aa."]))
    scores = {"b.": 0.25, "bb.": 0.5, "a.": 1.0, "aa.": 7.0}
    source = make_source(
        rl_config("rl.rollout.log_samples=16"), actor, score=lambda text, _: scores[text]
    )
    rollouts = source.generate(Timers())
    assert rollouts.metrics["reward/mean"] == pytest.approx((0.25 + 0.5 + 1 + 7) / 4)
    assert rollouts.metrics["rollout/accuracy"] == 0.5
    assert [sample["correct"] for sample in rollouts.samples] == [False, False, True, True] * 4


def test_position_advances_by_one_a_step_and_prompts_never_repeat():
    actor = FakeActor()
    source = make_source(rl_config(), actor)
    for step in range(3):
        assert source.position == step
        source.generate(Timers())
    drawn = [TOKENIZER.decode(p) for call in actor.calls for p in call["prompts"][::4]]
    assert drawn == prompt_names(0, 12)
    seeds = [seed for call in actor.calls for seed in call["seeds"]]
    assert len(set(seeds)) == 48


def test_a_source_at_the_same_position_draws_the_same():
    first, second = FakeActor(), FakeActor()
    ahead, resumed = make_source(rl_config(), first), make_source(rl_config(), second)
    ahead.generate(Timers())
    resumed.position = ahead.position
    a, b = ahead.generate(Timers()), resumed.generate(Timers())
    assert first.calls[1] == second.calls[0]
    assert torch.equal(a.batch.ids, b.batch.ids)
    assert a.metrics == b.metrics


def test_another_seed_draws_other_numbers():
    actors = [FakeActor(), FakeActor()]
    for seed, actor in enumerate(actors):
        stream = PromptStream(LetterTask())
        make_source(rl_config(f"seed={seed}"), actor, stream=stream).generate(Timers())
    assert actors[0].calls[0]["prompts"] == actors[1].calls[0]["prompts"]
    assert set(actors[0].calls[0]["seeds"]).isdisjoint(actors[1].calls[0]["seeds"])


def test_sample_seeds_fit_torch_and_do_not_collide():
    seeds = {sample_seed(key, index) for key in range(200) for index in range(200)}
    assert len(seeds) == 40_000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


# --- dynamic sampling -------------------------------------------------------------------------


def test_dynamic_sampling_replaces_groups_without_spread():
    """Prompts 1 and 3 of the first four, then 4, 6 and 7 of the next four have spread."""
    names = prompt_names(0, 12)
    actor = ScriptedActor(spread_only_in([names[i] for i in (1, 3, 4, 6, 7)]))
    source = make_source(rl_config(*DYNAMIC), actor)
    rollouts = source.generate(Timers())
    prompts = [TOKENIZER.encode(names[i]) for i in (1, 3, 4, 6) for _ in range(4)]
    got = [row[: len(p)] for row, p in zip(rollouts.batch.ids.tolist(), prompts, strict=True)]
    assert got == prompts
    assert rollouts.batch.advantages.abs().min() > 0
    # 0, 2 and 5 have no spread, 7 is one too many; metrics are about all eight groups drawn
    assert rollouts.metrics["rollout/dropped_groups"] == 4
    assert rollouts.metrics["rollout/tokens"] == sum(len(r) for r in actor.responses)
    assert rollouts.events == []
    assert len(actor.calls) == source.position == 2  # enough after two of three rounds


def test_dynamic_sampling_stops_after_the_first_round_if_all_groups_are_useful():
    actor = ScriptedActor(spread_only_in(prompt_names(0, 12)))
    source = make_source(rl_config(*DYNAMIC), actor)
    assert source.generate(Timers()).metrics["rollout/dropped_groups"] == 0
    assert source.position == 1
    source.generate(Timers())
    assert actor.calls[1]["prompts"][0] == TOKENIZER.encode(prompt_names(4, 1)[0])


def test_dynamic_sampling_fills_up_after_the_last_round_and_says_so():
    names = prompt_names(0, 12)
    actor = ScriptedActor(spread_only_in([names[5]]))
    source = make_source(rl_config(*DYNAMIC), actor)
    rollouts = source.generate(Timers())
    assert len(actor.calls) == source.position == 3
    assert len(rollouts.batch) == 16
    # the useful group first, then the earliest of the others
    order = [5, 0, 1, 2]
    prompts = [TOKENIZER.encode(names[i]) for i in order for _ in range(4)]
    got = [row[: len(p)] for row, p in zip(rollouts.batch.ids.tolist(), prompts, strict=True)]
    assert got == prompts
    assert torch.count_nonzero(rollouts.batch.advantages) == 4
    assert rollouts.metrics["rollout/dropped_groups"] == 8  # twelve drawn, four kept
    (event,) = rollouts.events
    assert "3 groups without spread kept after 3 rounds" in event


PENALTY = ("rl.overlong.buffer=4", "rl.overlong.penalty=0.8", "rl.advantage.normalize=false")


def wrong_and_long(names):
    """No right answer; those to ``names`` differ in their length."""
    return in_turn(lambda prompt: ["b.", "bbbbb."] if prompt in names else ["b."])


def test_groups_that_are_kept_for_want_of_better_ones_do_not_train_on_the_penalty():
    actor = ScriptedActor(wrong_and_long(prompt_names(0, 12)))
    rollouts = make_source(rl_config(*DYNAMIC, *PENALTY), actor).generate(Timers())
    assert "4 groups without spread kept after 3 rounds" in rollouts.events[0]
    assert not rollouts.batch.advantages.any()


def test_a_difference_in_the_penalty_is_one_where_rewards_are_asked_for():
    names = prompt_names(0, 12)
    actor = ScriptedActor(wrong_and_long([names[i] for i in (0, 2, 5, 7)]))
    config = rl_config(*DYNAMIC, *PENALTY, "rl.dynamic_sampling.spread_of=reward")
    rollouts = make_source(config, actor).generate(Timers())
    assert rollouts.events == []
    assert len(actor.calls) == 2
    assert rollouts.batch.advantages.tolist() == pytest.approx([0.4, -0.4] * 8)


def test_without_dynamic_sampling_the_penalty_trains():
    actor = ScriptedActor(wrong_and_long(prompt_names(0, 4)))
    batch = make_source(rl_config(*PENALTY), actor).generate(Timers()).batch
    assert batch.advantages.tolist() == pytest.approx([0.4, -0.4] * 8)


def test_without_dynamic_sampling_groups_without_spread_stay():
    actor = ScriptedActor(lambda prompt, seed: "a.")
    source = make_source(rl_config(), actor)
    rollouts = source.generate(Timers())
    assert torch.count_nonzero(rollouts.batch.advantages) == 0
    assert rollouts.metrics["rollout/dropped_groups"] == 0
    assert rollouts.events == []
    assert source.position == 1


# --- prompts ----------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_refused_with_its_place_and_a_remedy(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "abcdabcdabcd" + end, "answer": "a", "task_name": "exact"} for end in "abcd"
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = make_source(rl_config(), FakeActor(), stream=PromptStream(path))
    with pytest.raises(ValueError, match=r"prompt \d \('abcdabcdabcd.'\) has 13 tokens") as caught:
        source.generate(Timers())
    assert "max_position_embeddings" in str(caught.value)


def test_the_sampler_hands_settings_and_texts_through():
    config = rl_config()
    actor, seen = ScriptedActor(lambda prompt, seed: "ab."), []
    source = make_source(config, actor, score=lambda *texts: bool(seen.append(texts)))
    generate, used = actor.generate, []
    actor.generate = lambda requests, sampling: (
        used.append(sampling) or generate(requests, sampling)
    )
    source.generate(Timers())
    assert used == [SamplingSettings(1.0, 6, STOP_IDS)]
    assert seen == [("ab.", name) for name in "abcd" for _ in range(4)]


def test_verifiers_read_a_response_without_the_text_that_ended_it():
    actor, seen = ScriptedActor(lambda prompt, seed: "abcd"), []
    source = make_source(rl_config(), actor, score=lambda *texts: bool(seen.append(texts[0])))
    sampling = replace(source.sampler.sampling, stop_strings=("cd", "x"))
    source.sampler = replace(source.sampler, sampling=sampling)
    rollouts = source.generate(Timers())
    assert set(seen) == {"ab"}
    assert {sample["response"] for sample in rollouts.samples} == {"abcd"}
