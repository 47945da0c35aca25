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


def test_a_verifier_that_fails_everywhere_stops_the_run_and_corrected_goes_on(
    run, monkeypatch, tmp_path
):
    module = tmp_path / "occ_e2e_broken.py"
    module.write_text("def check(response):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    mine = ("data.verifiers.broken=occ_e2e_broken:check", "data.verifier=broken")
    with pytest.raises(SystemExit) as stopped:
        run("rl", "run", *mine, config=EXAMPLE)
    message = str(stopped.value)
    assert "all 32 failed" in message, "4 problems, 8 samples: the first validation"
    assert "'broken': TypeError: check() takes 1 positional argument but 2 were given" in message
    assert not (run.folder / "run" / "metrics.jsonl").exists(), "no step was trained"
    module.write_text("def check(response, answer):\n    return 1.0\n")
    folder = run("rl", "run", *mine, "rl.steps=1", "--resume", config=EXAMPLE)
    assert [line["reward/mean"] for line in metrics(folder, "rl")] == [1.0]


def test_a_verifier_that_fails_now_and_then_is_an_event_of_each_step(run, monkeypatch, tmp_path):
    source = "def check(response, answer):\n    return None if 'a' in response else 0.5\n"
    (tmp_path / "occ_e2e_fragile.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    mine = ("data.verifiers.brittle=occ_e2e_fragile:check", "data.verifier=brittle")
    folder = run("rl", "run", *mine, "rl.steps=1", config=EXAMPLE)
    (line,) = metrics(folder, "rl")
    events = {event["step"]: event["message"] for event in metrics(folder, "event")[:2]}
    assert events[1].startswith(f"{line['verifier/errors']:g} of 64 responses scored 0")
    assert events[1].endswith("the verifier returned None (NoneType), not a finite number")
    assert "of 32 responses" in events[0]
    for validation in metrics(folder, "validation"):
        assert validation["pass@1"] == 0
        assert 0 < validation["avg@8"] < 0.5


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
