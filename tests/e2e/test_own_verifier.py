"""A user's verifier, named in the configuration, gives the rewards of a run."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import ROOT, metrics

EXAMPLE = ROOT / "examples" / "own_verifier.yaml"


def test_the_verifier_of_the_example_scores_the_run(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = run("rl", "run", "rl.steps=2", config=EXAMPLE)
    # scores of 0 to 4 equal positions out of up to 4; other verifiers give 0 or 1 only
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        response, answer = line["response"], line["answer"]
        equal = sum(a == b for a, b in zip(response, answer, strict=False))
        expected = equal / max(len(response), len(answer))
        assert line["reward"] == pytest.approx(expected, abs=1e-5)
    assert len({line["reward"] for line in lines}) > 2
    for line in metrics(folder, "rl"):
        assert (line["verifier/errors"], line["verifier/timeouts"]) == (0, 0)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("lost=no_such_module:check", "no_such_module"),
        ("misspelt=examples.own_verifier:no_such_function", "no_such_function"),
        ("math=examples.own_verifier:echo", "'math' is taken"),
        ("lost=own_verifier.py", "module:function"),
    ],
)
def test_a_verifier_that_cannot_work_is_refused_before_anything_is_written(
    run, monkeypatch, verifier, message
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message):
        run("rl", "run", f"data.verifiers.{verifier}", config=EXAMPLE)
    assert not (run.folder / "run").exists()
