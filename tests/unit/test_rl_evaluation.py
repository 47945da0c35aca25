"""Validation: avg@k and pass@k by hand, and the same numbers on any layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.rl.evaluation import evaluate
from megatron_occ.rl.rewards import VerifierResult
from megatron_occ.rl.stopping import StopRequested
from megatron_occ.rollout import DraftStatistics
from tests.unit.fake_layouts import run_ranks
from tests.unit.fakes import TOKENIZER, FakeActor, ScriptedActor
from tests.unit.rl_setup import LetterTask, has_an_a, in_turn, make_source, rl_config


def measured(responses, *overrides, score=has_an_a, layout=None, stream=None, sets=None, part=0):
    config = rl_config("rl.validation.samples=3", *overrides)
    actor = ScriptedActor(responses, layout=layout) if responses else FakeActor(layout=layout)
    sampler = make_source(config, actor, score).sampler
    sets = sets or {"": stream or PromptStream(LetterTask(), split="validation")}
    return evaluate(sampler, sets, config.rl.validation, 0, part=part), actor


def validation(responses, *overrides, **options):
    (metrics, events), actor = measured(responses, *overrides, **options)
    assert events == []
    return metrics, actor


def test_average_and_pass_at_k_by_hand():
    """Right of three: 3, 1, 0 and 2."""
    texts = {"a": ["a."], "b": ["b.", "a.", "b."], "c": ["b."], "d": ["a.", "b.", "a."]}
    metrics, actor = validation(in_turn(texts.get), "rl.validation.temperature=0.6")
    assert metrics == pytest.approx(
        {"avg@3": 6 / 12, "pass@1": 6 / 12, "pass@3": 3 / 4, "problems": 4}
    )
    assert actor.calls[0]["temperature"] == 0.6


def test_one_sample_a_problem():
    metrics, _ = validation(
        in_turn(lambda prompt: ["a."] if prompt == "b" else ["b."]), "rl.validation.samples=1"
    )
    assert metrics == {"avg@1": 0.25, "pass@1": 0.25, "problems": 4}


def test_a_set_that_is_not_to_be_answered_is_left_out():
    actor = ScriptedActor(in_turn(lambda prompt: ["a."]))
    sampler = make_source(rl_config(), actor, has_an_a).sampler
    sets = {name: PromptStream(LetterTask(), split="validation") for name in "xyz"}
    turns = iter([None, None, StopRequested()])

    def before_set():
        turn = next(turns)
        if turn is not None:
            raise turn

    with pytest.raises(StopRequested):
        evaluate(sampler, sets, rl_config().rl.validation, 0, before_set=before_set)
    assert len(actor.calls) == 2


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        (
            DraftStatistics([10, 8], [6, 2], passes=10, tokens=18),
            {"acceptance_length": 1.8, "proposed_1": 1.0, "accepted_1": 0.6}
            | {"proposed_2": 0.8, "accepted_2": 0.25},
        ),
        (DraftStatistics(passes=10, tokens=10), {}),
    ],
)
def test_drafts_are_told_where_there_were_any(drafts, expected):
    actor = ScriptedActor(in_turn(lambda prompt: ["a."]))
    generate = actor.generate
    actor.generate = lambda *given: replace(generate(*given), drafts=drafts)
    config = rl_config()
    sampler = make_source(config, actor).sampler
    stream = PromptStream(LetterTask(), split="validation")
    metrics, _ = evaluate(sampler, {"": stream}, config.rl.validation, 0)
    found = {name: value for name, value in metrics.items() if name.startswith("draft/")}
    assert found == pytest.approx({f"draft/{name}": value for name, value in expected.items()})


def test_partial_credit_counts_in_the_average_alone():
    """Scores of a problem's three samples: 0.5, 0.5, 0.5 twice, and 1, 7, 0 twice."""
    texts = {"a": ["b."], "b": ["b."], "c": ["a.", "aa.", "c."], "d": ["a.", "aa.", "c."]}
    scores = {"a.": 1.0, "aa.": 7.0, "b.": 0.5, "c.": 0.0}
    metrics, _ = validation(in_turn(texts.get), score=lambda text, _: scores[text])
    assert metrics == pytest.approx(
        {"avg@3": (1.5 * 2 + 8 * 2) / 12, "pass@1": 4 / 12, "pass@3": 2 / 4, "problems": 4}
    )


def test_responses_that_no_verifier_could_score_are_told_and_count_as_wrong():
    texts = in_turn(lambda prompt: ["a.", "b."])
    error = VerifierResult(0.0, "error", "KeyError: 'b'")
    (metrics, events), _ = measured(texts, score=lambda text, _: error if "b" in text else 1.0)
    assert metrics["pass@1"] == 8 / 12
    (event,) = events
    assert event.startswith("4 of 12 responses scored 0 because their verifier failed")
    assert event.endswith("verifier 'letters': KeyError: 'b'")


def test_a_validation_in_which_every_verifier_fails_is_refused():
    error = VerifierResult(0.0, "error", "KeyError: 'b'")
    with pytest.raises(ValueError, match=r"all 12 failed .* verifier 'letters': KeyError: 'b'"):
        measured(None, score=lambda *_: error)


def test_validation_draws_the_same_every_time_and_on_any_layout():
    alone, actor = validation(None)
    again, other = validation(None)
    assert again == alone
    assert other.calls == actor.calls
    ranks = run_ranks(2, lambda layout: validation(None, layout=layout))
    for metrics, _ in ranks:
        assert metrics == pytest.approx(alone, rel=1e-12)
    seeds = [seed for _, rank in ranks for seed in rank.calls[0]["seeds"]]
    assert sorted(seeds) == sorted(actor.calls[0]["seeds"])
    assert len(set(seeds)) == 12


def test_validation_with_fewer_problems_than_ranks():
    ranks = run_ranks(3, lambda layout: validation(None, "rl.validation.problems=2", layout=layout))
    alone, _ = validation(None, "rl.validation.problems=2")
    assert [metrics for metrics, _ in ranks] == [pytest.approx(alone, rel=1e-12)] * 3
    # ranks that share experts generate together: all take part
    prompts = [[call["prompts"] for call in actor.calls] for _, actor in ranks]
    assert [[len(asked) for asked in calls] for calls in prompts] == [[3], [3], [0]]


def test_a_short_file_is_used_whole(tmp_path):
    path = tmp_path / "held_out.jsonl"
    lines = ['{"prompt": "a", "answer": "a"}', '{"prompt": "b", "answer": "b"}']
    path.write_text("\n".join(lines) + "\n")
    stream = PromptStream(path, split="validation")
    metrics, _ = validation(lambda prompt, seed: f"{prompt}.", stream=stream)
    assert metrics == {"avg@3": 0.5, "pass@1": 0.5, "pass@3": 0.5, "problems": 2}


def test_parts_have_problems_of_their_own_and_random_numbers_of_their_own():
    actors = [validation(None, part=part)[1] for part in (0, 1)]
    prompts = [[TOKENIZER.decode(ids) for ids in actor.calls[0]["prompts"]] for actor in actors]
    assert [set(texts) for texts in prompts] == [set("abcd"), set("efgh")]
    seeds = [set(actor.calls[0]["seeds"]) for actor in actors]
    assert len(seeds[0] | seeds[1]) == 24


def test_parts_of_a_file_differ_in_random_numbers_alone(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(f'{{"prompt": "{c}", "answer": "{c}"}}\n' for c in "abc"))
    stream = PromptStream(path, split="validation")
    calls = [validation(None, stream=stream, part=part)[1].calls[0] for part in (0, 1)]
    assert calls[0]["prompts"] == calls[1]["prompts"]
    assert len({*calls[0]["seeds"], *calls[1]["seeds"]}) == 18


def two_sets(tmp_path):
    """Right of three: 3 and 0 in "first", 1 in "second.b"."""
    files = {"first": "ab", "second.b": "c"}
    for name, letters in files.items():
        lines = [f'{{"prompt": "{c}", "answer": "a"}}\n' for c in letters]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = {name: tmp_path / f"{name}.jsonl" for name in files}
    return {name: PromptStream(path, split="validation") for name, path in paths.items()}


def test_several_sets_are_told_each_and_as_their_mean(tmp_path):
    texts = {"a": ["a."], "b": ["b."], "c": ["b.", "a.", "b."]}
    metrics, _ = validation(in_turn(texts.get), sets=two_sets(tmp_path))
    assert metrics == pytest.approx(
        {"avg@3": 5 / 12, "pass@1": 5 / 12, "pass@3": 3 / 4, "problems": 3}
        | {"first/avg@3": 1 / 2, "first/pass@1": 1 / 2, "first/pass@3": 1 / 2, "first/problems": 2}
        | {"second.b/avg@3": 1 / 3, "second.b/pass@1": 1 / 3, "second.b/pass@3": 1}
        | {"second.b/problems": 1}
    )


def test_several_sets_on_several_ranks(tmp_path):
    sets = two_sets(tmp_path)
    alone, _ = validation(None, sets=sets)
    for metrics, _ in run_ranks(2, lambda layout: validation(None, sets=sets, layout=layout)):
        assert metrics == pytest.approx(alone, rel=1e-12)


def test_a_set_draws_the_same_whatever_other_sets_there_are(tmp_path):
    sets = two_sets(tmp_path)
    _, both = validation(None, sets=sets)
    _, one = validation(None, sets={"second.b": sets["second.b"]})
    assert [call["seeds"] for call in both.calls][1] == one.calls[0]["seeds"]
    first, second = ({*call["seeds"]} for call in both.calls)
    assert not first & second


def test_warnings_name_their_set(tmp_path):
    error = VerifierResult(0.0, "error", "KeyError: 'b'")
    texts = in_turn({"a": ["a."], "b": ["b."], "c": ["a."]}.get)
    found = measured(texts, score=lambda t, _: error if "b" in t else 1.0, sets=two_sets(tmp_path))
    (event,) = found[0].events
    assert event.startswith("first: 3 of 6 responses scored 0 because their verifier failed")
