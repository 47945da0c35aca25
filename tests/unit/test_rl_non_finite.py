"""Skipped updates: who had what in them, and how many are too many."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_occ.rl.batch import MiniBatch
from megatron_occ.rl.non_finite import NonFiniteError, SkippedUpdates
from tests.unit.fake_layouts import FakeLayout, run_ranks
from tests.unit.fakes import TOKENIZER, FakeActor
from tests.unit.rl_setup import four_updates, mini_batches, weights
from tests.unit.test_pretraining import make_trainer as make_pretrainer


def skips_of(actor, folder, limit=None):
    return SkippedUpdates(actor, actor.layout, folder, limit, TOKENIZER.decode)


def spoil_row(mini, row, **values):
    """One sequence of a mini-batch with other values."""
    changed = {name: getattr(mini.rows, name).clone() for name in values}
    for name, value in values.items():
        changed[name][row] = value
    return replace(mini, rows=replace(mini.rows, **changed))


def read(folder):
    files = sorted((folder / "non_finite").iterdir())
    return {file.name: [json.loads(line) for line in file.open()] for file in files}


def test_a_bad_row_on_one_rank_skips_the_update_on_all_and_is_the_one_that_is_told(tmp_path):
    def work(layout):
        trainer, actor = four_updates("mtp.preset=policy", layout=layout)
        skips = skips_of(actor, tmp_path)
        mini = mini_batches(trainer)[0]
        if layout.data_parallel_rank == 1:
            mini = spoil_row(mini, 1, advantages=torch.nan)
        before = weights(actor)
        update = trainer.updater.run_update(mini)
        skips.note(update.skipped, 7, 0, mini)
        same = all(torch.equal(value, before[name]) for name, value in weights(actor).items())
        return update.skipped, update.metrics["update/skipped"], same, mini.rows

    results = run_ranks(2, work)
    assert [result[:3] for result in results] == [(True, 1.0, True)] * 2
    ((name, (line,)),) = read(tmp_path).items()
    assert name == "step_000007_update_0_data_rank_0001.jsonl"
    rows = results[1][3]
    prompt = int(rows.response_mask[1].int().argmax())
    assert line["not_finite"] == ["advantage"]
    assert (line["row"], line["advantage"]) == (1, "nan")
    assert line["ids"] == rows.ids[1, : len(line["ids"])].tolist()
    assert line["prompt"] == TOKENIZER.decode(line["ids"][:prompt])
    assert line["response"] == TOKENIZER.decode(line["ids"][prompt:])


@pytest.mark.parametrize(
    ("field", "named"),
    [("old_logprobs", "old log-probs"), ("rollout_logprobs", "log-probs of the rollout")],
)
def test_what_of_a_row_is_bad_is_named(tmp_path, field, named):
    trainer, actor = four_updates("mtp.preset=policy")
    mini = spoil_row(mini_batches(trainer)[0], 2, **{field: torch.inf})
    skips = skips_of(actor, tmp_path)
    skips.note(True, 1, 3, mini)
    ((name, (line,)),) = read(tmp_path).items()
    assert "update_3" in name
    assert (line["row"], line["not_finite"]) == (2, [named])


def test_spoilt_weights_show_in_every_row(tmp_path):
    trainer, actor = four_updates("mtp.preset=policy")
    mini = mini_batches(trainer)[0]
    with torch.no_grad():
        actor.model.output[3] = torch.nan
    skips_of(actor, tmp_path).note(True, 1, 0, mini)
    (lines,) = read(tmp_path).values()
    assert [line["not_finite"] for line in lines] == [["log-probs"]] * len(mini.rows)


def test_where_nothing_can_be_seen_all_responses_are_written(tmp_path):
    trainer, actor = four_updates("mtp.preset=policy")
    mini = mini_batches(trainer)[0]
    skips_of(actor, tmp_path).note(True, 1, 0, mini)
    (lines,) = read(tmp_path).values()
    assert [line["not_finite"] for line in lines] == [[]] * len(mini.rows)


def test_only_skipped_updates_in_a_row_count(tmp_path):
    skips = SkippedUpdates(FakeActor(), FakeLayout(), None, 3, str)
    rows = MiniBatch(None, [])
    for skipped in (True, True, False, True, True):
        skips.note(skipped, 1, 0, rows)
        skips.check(1)
    skips.note(True, 1, 0, rows)
    with pytest.raises(NonFiniteError, match=r"last 3 updates .*max_skipped_updates=3\): stopped"):
        skips.check(1)


def spoil(outputs, target, forward_only):
    return replace(outputs, logprobs=outputs.logprobs * torch.nan)


def test_rl_ends_with_a_checkpoint_after_too_many(tmp_path):
    saved = []
    trainer, actor = four_updates("rl.steps=9", "rl.save_every=100", save=saved.append)
    trainer.supervision.skips = skips_of(actor, tmp_path, limit=6)
    actor.spoil = spoil
    with pytest.raises(NonFiniteError, match="stopped after step 2, with a checkpoint"):
        trainer.fit()
    assert saved == [2]
    # four updates a step
    assert len(read(tmp_path)) == 8
    assert [m["update/skipped"] for p, _, m in trainer.recorder.lines if p == "rl"] == [1.0, 1.0]


def test_pretraining_ends_with_a_checkpoint_after_too_many(tmp_path):
    trainer, _, saved = make_pretrainer("log_every=1")
    trainer.supervision.skips = skips_of(trainer.actor, tmp_path, limit=2)
    trainer.actor.spoil = spoil
    with pytest.raises(NonFiniteError, match="after step 2"):
        trainer.fit()
    assert saved == [2]
    (first, second) = read(tmp_path).values()
    assert len(first) == len(second) == 4
