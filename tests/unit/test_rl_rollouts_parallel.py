"""The same rollouts on any layout: prompts, scores, dynamic sampling, metrics."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.observe.progress import Timers
from tests.unit.fake_layouts import FakeLayout, run_ranks
from tests.unit.fakes import FakeActor, ScriptedActor
from tests.unit.rl_setup import DYNAMIC, make_source, prompt_names, rl_config, spread_only_in


def test_two_ranks_draw_together_what_one_draws():
    config = rl_config()
    whole = FakeActor()
    make_source(config, whole).generate(Timers())
    halves = []
    for rank in (0, 1):
        actor = FakeActor(layout=FakeLayout(rank, 2))
        batch = make_source(config, actor).generate(Timers()).batch
        assert len(batch) == 8
        halves.append(actor.calls[0])

    def pairs(call):
        return list(zip(map(tuple, call["prompts"]), call["seeds"], strict=True))

    assert sorted(pairs(halves[0]) + pairs(halves[1])) == sorted(pairs(whole.calls[0]))
    assert not set(pairs(halves[0])) & set(pairs(halves[1]))


def test_metrics_of_two_ranks_are_those_of_one():
    config = rl_config()
    alone = make_source(config, FakeActor()).generate(Timers())
    ranks = run_ranks(
        2, lambda layout: make_source(config, FakeActor(layout=layout)).generate(Timers())
    )
    for rank in ranks:
        assert rank.metrics == pytest.approx(alone.metrics, rel=1e-12)


def text_of(rollouts, ranks):
    """Prompt, response and advantage of each row, in global order, from all ranks' rollouts."""
    rows = [iter(range(len(rollouts[rank].batch))) for rank in range(ranks)]
    step = []
    for owner in rollouts[0].owners:
        batch, row = rollouts[owner].batch, next(rows[owner])
        step.append((*batch.ids[row].tolist(), float(batch.advantages[row])))
    return step


@pytest.mark.parametrize("useful", [(1, 3, 4, 6, 7), (1, 3, 5, 7), (0, 2, 8, 10), (5,), ()])
@pytest.mark.parametrize("ranks", [2, 4])
def test_dynamic_sampling_chooses_the_same_groups_on_any_layout(useful, ranks):
    """Rank r draws prompts r, r + ranks, ...: often one has all that is of use."""
    names = prompt_names(0, 12)

    def draw(layout):
        actor = ScriptedActor(spread_only_in([names[i] for i in useful]), layout=layout)
        # no response is cut off; a rank may have none at all
        source = make_source(rl_config(*DYNAMIC, "rl.overlong.leave_out=true"), actor)
        return source.generate(Timers()), source.position

    alone, position = draw(FakeLayout())
    results = run_ranks(ranks, draw)
    rollouts = [result for result, _ in results]
    assert [at for _, at in results] == [position] * ranks
    assert text_of(rollouts, ranks) == text_of([alone], 1)
    for rank in rollouts:
        assert rank.metrics == pytest.approx(alone.metrics, rel=1e-12)
        assert rank.events == alone.events


def test_a_batch_is_as_wide_on_every_rank():
    """Prompt c alone, on rank 0 of 2, is answered at length."""
    actor_of = {}

    def draw(layout):
        actor_of[layout.data_parallel_rank] = actor = ScriptedActor(
            lambda prompt, seed: "bbbbb." if prompt == "c" else "a.", layout=layout
        )
        return make_source(rl_config(), actor).generate(Timers()).batch

    for batch in run_ranks(2, draw):
        assert batch.ids.shape == (8, 7)
    assert max(map(len, actor_of[1].responses)) == 2


def test_ranks_of_one_share_take_the_scores_of_their_main_rank():
    """Verifiers run under time limits: two processes may get two answers."""

    class SecondOfTwo(FakeLayout):
        is_model_parallel_main = False

        def broadcast_model_parallel(self, values):
            if values.dim() != 2:
                return values
            scores, failed = values
            scores.copy_(torch.arange(len(scores)) % 2)
            failed.copy_(torch.arange(len(scores)) % 4 == 2)
            return values

    def forbidden(*_):
        raise AssertionError("only one rank asks the verifiers")

    config = rl_config("rl.advantage.without_failures=true", "rl.advantage.normalize=false")
    source = make_source(config, FakeActor(layout=SecondOfTwo()), score=forbidden)
    rollouts = source.generate(Timers())
    assert rollouts.metrics["reward/mean"] == 0.5
    # scores 0, 1 and 1 of groups of four, whose third response failed
    expected = pytest.approx([-2 / 3, 1 / 3, 0.0, 1 / 3] * 4)
    assert rollouts.batch.advantages.tolist() == expected
