"""Any layout gives the run of one process, also from its middle: rollouts, losses, lambda."""

from __future__ import annotations

import pytest

from megatron_occ.rl.trainer import GRPOTrainer
from tests.e2e.conftest import (
    Killed,
    Runner,
    assert_same_numbers,
    forked,
    kill_after,
    metrics,
    read_lines,
    torchrun,
)

# drafts of a fixed length: `auto` follows the clock, and two runs log different ones
FIXED = "rl.rollout.speculative.mode=fixed"
ARGUMENTS = ("rl.steps=2", "mtp.preset=occ_decoupled", "mtp.num_layers=2", FIXED)


PACKED = ("rl.micro_batch_size=128", "rl.micro_batch_tokens=64")


def launch(folder, ranks, *overrides, start=forked):
    """A run of several processes that comes to its end."""
    done = start(folder, ranks, *ARGUMENTS, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


LAYOUTS = {
    "data": (2, ()),
    "tensor": (2, ("parallel.tensor=2",)),
    "pipeline": (2, ("parallel.pipeline=2",)),
    "context": (2, ("parallel.context=2",)),
    "tensor and pipeline": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "context, packed": (2, ("parallel.context=2", *PACKED)),
    "sequence, packed": (2, ("parallel.tensor=2", "parallel.sequence=true", *PACKED)),
}


@pytest.fixture(scope="module")
def one(pretrained, tmp_path_factory):
    """The run of a single process."""
    run = Runner(tmp_path_factory.mktemp("one"))
    return run("rl", "one", f"rl.init_from={pretrained(2)}", *ARGUMENTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_equal_one(one, pretrained, tmp_path, layout):
    ranks, overrides = LAYOUTS[layout]
    # one of them as a user starts it
    start = torchrun if layout == "data" else forked
    words = (f"rl.init_from={pretrained(2)}", *overrides)
    several = launch(tmp_path / "run", ranks, *words, start=start)
    assert (one / "rollouts.jsonl").read_text().count("\n") == 4
    assert any(line["grad_norm/trunk"] > 0 for line in metrics(one, "rl"))
    assert_same_numbers(several, one)
    sampled = [read_lines(folder / "rollouts.jsonl") for folder in (several, one)]
    assert [line["response"] for line in sampled[0]] == [line["response"] for line in sampled[1]]


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_run_says_once_that_its_layout_drafts_nothing(pretrained, tmp_path, mode):
    apart = ("parallel.pipeline=3", "parallel.pipeline_layout=Ett|mm|L")
    mode = f"rl.rollout.speculative.mode={mode}"
    folder = launch(tmp_path / "run", 3, f"rl.init_from={pretrained(2)}", *apart, mode)
    events = [line for line in read_lines(folder / "metrics.jsonl") if line["phase"] == "event"]
    told = [event["message"] for event in events if "draft" in event["message"]]
    layout = "parallel.pipeline_layout=Ett|mm|L has the MTP layers and the output layer"
    assert [message.startswith(f"rollouts draft nothing: {layout}") for message in told] == (
        [True] if mode.endswith("auto") else []
    )


# the head learns on trunk states of rollouts, those of dropped groups included
STATES = (
    "mtp.preset=null",
    "mtp.trunk.signal=policy",
    "mtp.trunk.coefficient=occ",
    "mtp.head={signal: soft_ce, states: rollout}",
    "rl.algorithm=dapo",
    "rl.dynamic_sampling.max_rounds=2",
)


@pytest.fixture(scope="module")
def one_on_states(pretrained, tmp_path_factory):
    """The run of a single process."""
    run = Runner(tmp_path_factory.mktemp("one"))
    return run("rl", "states", f"rl.init_from={pretrained(2)}", *ARGUMENTS, *STATES)


@pytest.mark.parametrize("layout", ["data", "context", "sequence, packed"])
def test_heads_trained_on_states_of_rollouts_are_those_of_one_process(
    one_on_states, pretrained, tmp_path, layout
):
    ranks, overrides = LAYOUTS[layout]
    start = f"rl.init_from={pretrained(2)}"
    several = launch(tmp_path / "run", ranks, start, *STATES, *overrides)
    assert all(line["rollout/dropped_groups"] > 0 for line in metrics(one_on_states, "rl"))
    assert_same_numbers(several, one_on_states)


@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline"])
def test_processes_go_on_with_the_run_of_one(run, one, pretrained, tmp_path, monkeypatch, layout):
    start = f"rl.init_from={pretrained(2)}"
    with monkeypatch.context() as patched:
        kill_after(patched, GRPOTrainer, 1)
        with pytest.raises(Killed):
            run("rl", "several", start, *ARGUMENTS)
    ranks, overrides = LAYOUTS[layout]
    several = launch(tmp_path / "several", ranks, start, *overrides, "--resume")
    assert [line["step"] for line in metrics(several, "rl")] == [1, 2]
    assert_same_numbers(several, one)


def test_one_process_goes_on_with_the_run_of_four(run, one, pretrained, tmp_path):
    """A checkpoint of two by two ranks, optimizer included, continues on one."""
    start = f"rl.init_from={pretrained(2)}"
    ranks, overrides = LAYOUTS["tensor and pipeline"]
    folder = launch(tmp_path / "several", ranks, start, *overrides, "rl.steps=1")
    run("rl", "several", start, *ARGUMENTS, "--resume")
    assert [line["step"] for line in metrics(folder, "rl")] == [1, 2]
    assert_same_numbers(folder, one, phases=("rl",))
