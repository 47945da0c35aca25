"""The pretraining loop on a fake actor: its end, its log, its resumption."""

from __future__ import annotations

import pytest

from megatron_occ.config import load_config
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.pretraining import PretrainTrainer
from tests.unit.fakes import TOKENIZER, FakeActor
from tests.unit.rl_setup import LetterTask, Recorder


def make_trainer(*overrides, rates=(), events=(), supervision=None):
    given = ("batch_size=4", "micro_batch_size=2", "sequence_length=8", "steps=8", "log_every=4")
    config = load_config([], [f"pretrain.{item}" for item in (*given, *overrides)])
    config.mtp.num_layers = 2
    rates, saved, logger = iter(rates), [], Recorder()
    trainer = PretrainTrainer(
        config,
        FakeActor(depths=2),
        TaskCorpus(LetterTask(), TOKENIZER),
        validate=lambda: Validation({"pass@1": next(rates), "problems": 4.0}, list(events)),
        logger=logger,
        save=saved.append,
        supervision=supervision,
    )
    return trainer, logger, saved


def test_it_runs_all_steps_and_logs_and_saves_when_due():
    trainer, logger, saved = make_trainer("save_every=3")
    trainer.fit()
    assert trainer.step == 8
    assert saved == [3, 6, 8]
    assert [step for _, step, _ in logger.lines] == [4, 8]
    assert all("pass@1" not in metrics for _, _, metrics in logger.lines)
    for name in ("loss/main", "loss/mtp_2", "agreement/mtp_1", "grad_norm/trunk", "time/step"):
        assert name in logger.lines[0][2]


def test_the_actor_is_told_where_the_text_of_each_row_ends(monkeypatch):
    trainer, _, _ = make_trainer()
    own, told = trainer.actor.micro_batch, []

    def micro_batch(ids, mask, **named):
        told.append((ids, named["ends"]))
        return own(ids, mask, **named)

    monkeypatch.setattr(trainer.actor, "micro_batch", micro_batch)
    trainer.run_step()
    assert [len(ends) for _, ends in told] == [2, 2]
    for ids, ends in told:
        assert ends.tolist() == [row.index(TOKENIZER.eos_id) + 1 for row in ids.tolist()]


def test_it_learns():
    trainer, logger, _ = make_trainer("steps=40", "log_every=1")
    trainer.fit()
    losses = [metrics["loss/main"] for _, _, metrics in logger.lines]
    assert losses[-1] < 0.8 * losses[0]


def test_it_ends_at_the_pass_rate():
    settings = ("validate_every=2", "stop_at_pass_rate=0.5", "save_every=100")
    trainer, logger, saved = make_trainer(*settings, rates=(0.1, 0.5, 0.9))
    trainer.fit()
    assert (trainer.step, saved) == (4, [4])
    assert [metrics["pass@1"] for _, _, metrics in logger.lines] == [0.1, 0.5]
    (event,) = logger.events
    assert "pass@1 0.500" in str(event)

    resumed, _, saved_again = make_trainer(*settings)
    resumed.load_state_dict(trainer.state_dict())
    resumed.fit()
    assert (resumed.step, saved_again) == (4, [])


def test_warnings_about_a_measurement_are_events_of_its_step():
    trainer, logger, _ = make_trainer("validate_every=4", rates=[0.1, 0.2], events=["3 failed"])
    trainer.fit()
    assert logger.events == [(4, "3 failed"), (8, "3 failed")]


def test_the_time_of_a_step_is_without_validation(monkeypatch):
    """Each step takes 1 s of this clock, each validation 100 s."""
    now = [0.0]
    trainer, logger, _ = make_trainer("validate_every=2", "log_every=3")
    original = trainer.run_step

    def run_step():
        now[0] += 1.0
        return original()

    def validate():
        now[0] += 100.0
        return Validation({"pass@1": 0.1}, [])

    monkeypatch.setattr(trainer, "run_step", run_step)
    monkeypatch.setattr(trainer, "validate", validate)
    monkeypatch.setattr("megatron_occ.rl.pretraining.time.perf_counter", lambda: now[0])
    trainer.fit()
    lines = {step: metrics for _, step, metrics in logger.lines}
    assert sorted(lines) == [2, 3, 4, 6, 8]
    assert {metrics["time/step"] for metrics in lines.values()} == {1.0}
    assert {metrics["tokens_per_second"] for metrics in lines.values()} == {4 * 8}
    for step, metrics in lines.items():
        assert metrics.get("time/validation") == (100.0 if step % 2 == 0 else None)


def test_a_finished_run_goes_on_when_asked_for_more_steps():
    trainer, _, _ = make_trainer("steps=2")
    trainer.fit()
    longer, _, saved = make_trainer("steps=5")
    longer.load_state_dict(trainer.state_dict())
    longer.fit()
    assert (longer.step, saved) == (5, [5])


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_cut_into_micro_batches_does_not_matter(micro_batch_size):
    whole, cut = (
        make_trainer("micro_batch_size=4"),
        make_trainer(f"micro_batch_size={micro_batch_size}"),
    )
    expected, metrics = whole[0].run_step(), cut[0].run_step()
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-9), name
