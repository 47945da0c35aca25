"""Evaluation of a set: figures by hand, every response in order, the same on any layout."""

from __future__ import annotations

import json

import pytest

from megatron_occ.config.evaluation import eval_settings
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.rl.assessment import assess
from megatron_occ.rl.rewards import VerifierResult, Votes
from tests.unit.fake_layouts import run_ranks
from tests.unit.fakes import FakeActor, ScriptedActor
from tests.unit.rl_setup import FakeVerifiers, LetterTask, has_an_a, in_turn, make_source, rl_config

# of "c" all three are wrong, two of them alike
TEXTS = {
    "a": ["a.", "b.", "a."],
    "b": ["b.", "a.", "b."],
    "c": ["d.", "e.", "d."],
    "d": ["a.", "b."],
}


class VotingVerifiers(FakeVerifiers):
    """Reads the first letter as the answer; none where it is a "d"."""

    def votes(self, questions):
        return [self.vote(each) for each in questions]

    @staticmethod
    def vote(question):
        answers = [text[:1].replace("d", "") for text in question.responses]
        pairs = zip(answers, question.right, strict=True)
        groups = [0 if right else ord(text) - 90 if text else -1 for text, right in pairs]
        return Votes(answers, groups)


def assessed(responses, *overrides, score=has_an_a, layout=None, verifiers=VotingVerifiers):
    config = rl_config("rl.validation.samples=3", *overrides)
    actor = ScriptedActor(responses, layout=layout) if responses else FakeActor(layout=layout)
    sampler = make_source(config, actor, verifiers(score)).sampler
    stream, written = PromptStream(LetterTask(), split="validation"), []
    settings = eval_settings(config)
    return assess(sampler, stream, settings, 0, written.append), written, actor


def test_figures_by_hand():
    """Right of three: 2, 1, 0 and 2; votes: right, wrong, wrong, right."""
    found, written, actor = assessed(in_turn(TEXTS.get), "eval.temperature=0.5")
    values = {name: figure.value for name, figure in found.figures.items()}
    assert values == pytest.approx(
        {"avg@3": 5 / 12, "pass@1": 5 / 12, "pass@2": (1 + 2 / 3 + 0 + 1) / 4, "pass@3": 3 / 4}
        | {"maj@3": 1 / 2, "truncated": 0, "length": 2}
    )
    # by problem 2/3, 1/3, 0, 2/3: squares of deviations sum to 11/36
    assert found.figures["avg@3"].error == pytest.approx((11 / 36 / 3 / 4) ** 0.5)
    assert (found.problems, found.notes) == (4, [])
    assert actor.calls[0]["temperature"] == 0.5
    assert [entry["prompt"] for entry in written] == ["a", "b", "c", "d"]
    assert written[1]["place"] == "letters, validation problem 1"
    assert written[1]["responses"][1] == {
        **{"sample": 1, "response": "a.", "score": 1.0, "correct": True, "tokens": 2},
        **{"truncated": False, "read": "a", "group": 0},
    }


def test_responses_without_an_end_are_truncated():
    found, written, _ = assessed(in_turn(lambda p: ["abcabc"] if p == "a" else ["b."]))
    assert found.figures["truncated"].value == 1 / 4
    assert found.figures["length"].value == (6 + 2 + 2 + 2) / 4
    assert [entry["responses"][0]["truncated"] for entry in written] == [True, False, False, False]


def test_a_verifier_without_answers_leaves_the_majority_out_and_says_so():
    found, written, _ = assessed(in_turn(TEXTS.get), verifiers=FakeVerifiers)
    assert "maj@3" not in found.figures
    (note,) = found.notes
    expected = "maj@3 is left out: verifier 'letters' reads no answers"
    assert note == f"{expected} (letters, validation problem 0)"
    assert "read" not in written[0]["responses"][0]


def test_one_response_needs_no_majority():
    found, _, _ = assessed(in_turn(TEXTS.get), "eval.samples=1", verifiers=FakeVerifiers)
    assert set(found.figures) == {"avg@1", "pass@1", "truncated", "length"}
    assert found.notes == []


def test_a_failed_verifier_is_told_with_its_response():
    error = VerifierResult(0.0, "error", "KeyError: 'b'")

    def score(text, _):
        return error if "b" in text else 1.0

    found, written, _ = assessed(in_turn(TEXTS.get), score=score)
    assert found.notes[0].startswith("4 of 12 responses scored 0")
    assert written[0]["responses"][1]["verifier_failure"] == "KeyError: 'b'"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_what_one_writes(ranks):
    """Drawn by seeds, so that they are the same; all but the main rank write nothing."""
    alone, written, _ = assessed(None)
    found = run_ranks(ranks, lambda layout: assessed(None, layout=layout))
    assert json.dumps(found[0][1]) == json.dumps(written)
    assert found[0][0].figures == alone.figures
    assert all(lines == [] and not other.figures for other, lines, _ in found[1:])
