"""The audit on Megatron: what it measures, and that it leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.layout_cases import PP2, TP2, read
from benchmarks.layout_runs import _actor, _load, _save, mini_batches
from megatron_occ.audit.signals import BINS, SIGNALS, tail
from megatron_occ.mcore import gradients
from megatron_occ.mcore.optimizer_state import state_tensors
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.measuring import Measuring
from megatron_occ.rl.update import PolicyUpdater
from tests.mcore.distributed import run_ranks

MODEL = ("mtp.preset=detach", "mtp.num_layers=2", "model.tie_embeddings=false")


def state(actor):
    weights = [p.detach().clone() for chunk in actor.chunks for p in chunk.parameters()]
    return weights + [t.clone() for t in state_tensors(actor.optimizer.megatron)]


def samples(model, layout, folder, block=gradients.BLOCK):
    """Figures of two mini-batches, an update between them, undone at the end."""
    gradients.BLOCK = block
    config = read(model, layout)
    initialize(config)
    actor = _actor(config)
    if folder.joinpath("start").exists():
        _load(actor, folder / "start")
        actor.optimizer.megatron.reload_model_params()
    else:
        _save(actor, folder / "start")
    updater = PolicyUpdater(config, actor)
    batches = mini_batches(config, actor)
    updater.run_update(batches[0])
    before, updates = state(actor), actor.version
    place = actor.optimizer.schedule.state_dict()
    measuring, found = Measuring(config, actor, window=1), []
    with actor.restored():
        found.append(measuring.measure(batches[0]))
        updater.run_update(batches[0])
        measuring.end_round()
        found.append(measuring.measure(batches[1]))
    after = state(actor)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert actor.version == updates
    assert actor.optimizer.schedule.state_dict() == place and place["num_steps"] == 1
    # nothing of the trial is left in the buffers either
    metrics = updater.run_update(batches[1]).metrics
    return found, actor.gradient_space.size(), measuring.signals, metrics


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    (found,) = run_ranks(samples, 1, MODEL, (), folder)
    return found, folder


def numbers(value):
    """All numbers of nested lists and dicts, in one order."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers(value[key])]
    if isinstance(value, list):
        return [x for each in value for x in numbers(each)]
    return [] if value is None else [float(value)]


# a vocabulary of 29 has one row of padding over two ranks, in embedding and output layer
@pytest.mark.parametrize(
    ("layout", "padding"),
    [((TP2,), 2 * 32), ((PP2,), 0), (("parallel.distributed_optimizer=true",), 0)],
)
def test_a_layout_measures_what_one_process_does(alone, layout, padding):
    (expected, size, signals, metrics), folder = alone
    for found, count, names, after in run_ranks(samples, 2, MODEL, layout, folder):
        assert count == size + padding and names == signals
        for sample, wanted in zip(found, expected, strict=True):
            assert json.loads(json.dumps(sample)).keys() == wanted.keys()
            for metric in ("euclidean", "adam"):
                scale = max(abs(x) for x in numbers(wanted["same"][metric]))
                for kind in ("same", "cross"):
                    pairs = zip(
                        numbers(sample[kind][metric]), numbers(wanted[kind][metric]), strict=True
                    )
                    assert all(abs(a - b) <= 1e-5 * scale for a, b in pairs), (kind, metric)
            for kind in ("tails", "proxies"):
                pairs = list(zip(numbers(sample[kind]), numbers(wanted[kind]), strict=True))
                assert all(a == pytest.approx(b, rel=1e-3, abs=1e-6) for a, b in pairs), kind
        assert after["loss/policy"] == pytest.approx(metrics["loss/policy"], rel=1e-5)


def test_products_in_blocks_are_those_of_whole_parameters(alone):
    (expected, *_), folder = alone
    ((found, *_),) = run_ranks(samples, 1, MODEL, (), folder, 100)
    for sample, wanted in zip(found, expected, strict=True):
        assert numbers(sample["same"]) == pytest.approx(numbers(wanted["same"]), rel=1e-9)


def test_signals_differ_where_they_should(alone):
    (found, _, signals, _), _ = alone
    assert [s["depth"] for s in signals] == [1, 2] * len(SIGNALS)
    first = found[0]["same"]["euclidean"]
    totals = {(s["name"], s["depth"]): sum(v) for s, v in zip(signals, first["v2"], strict=True)}
    assert totals["policy, no dual clip", 1] >= totals["policy, dual clip 3", 1]
    assert len({round(v, 12) for (_, depth), v in totals.items() if depth == 1}) >= 4
    (pair,) = found[1]["cross"]["euclidean"]
    assert pair["other"] == 0 and found[0]["cross"]["euclidean"] == []


def test_the_tail_is_the_share_of_the_largest_thousandth():
    def metrics(counts, squares, absolute):
        found = {f"count/{i}": torch.tensor(0.0) for i in range(BINS)}
        found |= {f"square/{i}": torch.tensor(0.0) for i in range(BINS)}
        for i, count in counts.items():
            found[f"count/{i}"], found[f"square/{i}"] = (
                torch.tensor(float(count)), torch.tensor(float(squares[i]))
            )  # fmt: skip
        return found | {"absolute": torch.tensor(absolute)}

    # 2,000 tokens: two of them are the thousandth, one has weight 100 and one of four has 10
    found = tail(metrics({100: 1995, 110: 4, 120: 1}, {100: 1995, 110: 400, 120: 10000}, 2135.0))
    total = 1995 + 400 + 10000
    assert found["top"] == pytest.approx((10000 + 100) / total)
    assert found["effective"] == pytest.approx(2135**2 / total / 2000)
    assert tail(metrics({}, {}, 0.0)) == {"top": 0.0, "effective": 0.0}
