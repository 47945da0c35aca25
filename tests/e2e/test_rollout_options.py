"""Keys of ``rl.rollout`` reach the engine of a run, and its drafts reach the log."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import metrics, read_lines

QUICK = ("rl.steps=2", "rl.prompts_per_step=16", "rl.rollout.log_samples=16")
SPECULATIVE = "rl.rollout.speculative"


def texts(folder):
    return [line["response"] for line in read_lines(folder / "rollouts.jsonl")]


def same_training(folder, other):
    """Metrics but for those of drafts, and of the gap, which rounds otherwise."""
    pairs = zip(metrics(folder, "rl"), metrics(other, "rl"), strict=True)
    for line, expected in pairs:
        names = {n for n in expected if not n.startswith(("draft/", "logprob_gap", "phase"))}
        assert names == {n for n in line if not n.startswith(("draft/", "logprob_gap", "phase"))}
        for name in names:
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_a_run_is_the_same_with_and_without_drafts(run, pretrained):
    start = f"rl.init_from={pretrained(2)}"
    arguments = (*QUICK, "mtp.num_layers=2", start)
    off = run("rl", "off", *arguments, f"{SPECULATIVE}.mode=off")
    fixed = run("rl", "fixed", *arguments, f"{SPECULATIVE}={{mode: fixed, draft_length: 2}}")
    auto = run("rl", "auto", *arguments)
    assert texts(off) == texts(fixed) == texts(auto)
    same_training(fixed, off)
    same_training(auto, off)
    drafted = metrics(fixed, "rl")[0]
    assert drafted["draft/acceptance_length"] > 1.2
    assert 0 < drafted["draft/accepted_2"] <= drafted["draft/accepted_1"] <= 1
    assert drafted["draft/proposed_1"] > 0.9
    plain = metrics(off, "rl")[0]
    assert plain["draft/acceptance_length"] == 1
    assert "draft/accepted_1" not in plain


def test_speculative_sampling_draws_other_tokens_and_learns_too(run, pretrained):
    arguments = (*QUICK, f"rl.init_from={pretrained(1)}", f"{SPECULATIVE}.mode=fixed")
    coupled = run("rl", "coupled", *arguments)
    rejection = run("rl", "rejection", *arguments, f"{SPECULATIVE}.acceptance=rejection")
    assert texts(rejection) != texts(coupled)
    again = run("rl", "again", *arguments, f"{SPECULATIVE}.acceptance=rejection")
    assert texts(again) == texts(rejection)
    for line in metrics(rejection, "rl"):
        assert line["logprob_gap/max"] < 1e-4
        assert line["reward/mean"] > 0


def test_cuts_and_stop_strings(run, pretrained):
    start = f"rl.init_from={pretrained(1)}"
    free = run("rl", "free", *QUICK, start)
    greedy = run("rl", "top_k", *QUICK, start, "rl.rollout.top_k=1", "rl.steps=1")
    by_prompt = {}
    for line in read_lines(greedy / "rollouts.jsonl"):
        assert by_prompt.setdefault(line["prompt"], line["response"]) == line["response"]
    nucleus = run("rl", "top_p", *QUICK, start, "rl.rollout.top_p=0.5", "rl.steps=1")
    assert texts(nucleus) != texts(free)[: len(texts(nucleus))]
    stopped = run("rl", "stop", *QUICK, start, "rl.rollout.stop=['+']", "rl.steps=1")
    for text in texts(stopped):
        assert "+" not in text[:-1]
    assert any(text.endswith("+") for text in texts(stopped))


def test_with_its_masks_a_policy_under_cuts_is_the_one_that_sampled(run, pretrained):
    """The ratio of the first mini-batch is 1: log-probs are of the tokens that could be drawn."""
    cuts = ("rl.rollout.top_p=0.9", "rl.rollout.top_k=12", "rl.old_logprobs=rollout")
    start = (f"rl.init_from={pretrained(1)}", "rl.steps=1", "rl.mini_batches=1")
    arguments = (*QUICK, *start, "mtp.preset=detach")
    kl = "rl.loss.kl_coefficient=0.1"
    kept = run("rl", "kept", *arguments, *cuts, kl, "rl.loss.sampling_mask=true")
    (line,) = metrics(kept, "rl")
    assert line["logprob_gap/max"] < 1e-4
    assert line["ratio/mean"] == pytest.approx(1, abs=1e-6)
    # the reference is the same policy, under the same cuts
    assert line["loss/kl"] == pytest.approx(0, abs=1e-9)
    free = run("rl", "not_kept", *arguments, "rl.rollout.top_p=0.9", "rl.rollout.top_k=12")
    whole = metrics(free, "rl")[0]
    assert texts(kept) == texts(free)
    assert line["entropy"] < 0.9 * whole["entropy"]
    scored = run("rl", "scored", *arguments, "rl.loss.sampling_mask=true", *cuts[:2], kl)
    (trained,) = metrics(scored, "rl")
    assert trained["logprob_gap/max"] < 1e-4
    assert trained["loss/policy"] == pytest.approx(line["loss/policy"], abs=1e-6)


def test_greedy_validation_gives_the_same_figure_every_time(run, pretrained):
    arguments = (*QUICK, f"rl.init_from={pretrained(1)}", "rl.steps=1")
    greedy = ("rl.validation.temperature=0", "rl.validation.samples=3")
    (first, _) = metrics(run("rl", "one", *arguments, *greedy), "validation")
    (second, _) = metrics(run("rl", "other", *arguments, *greedy, "seed=1"), "validation")
    assert first["pass@1"] == pytest.approx(first["pass@3"])
    assert second["pass@1"] == pytest.approx(second["pass@3"])
