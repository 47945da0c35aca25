"""Inner products of gradients under every kind of layout, against backward passes of one process.

The oracle takes the two losses apart: a backward pass of the policy loss alone and one of the MTP
loss alone, and multiplies the gradients parameter by parameter. A layout's own figures come from
whole updates.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.layout_cases import CP2, PACKED, PP2, TP2, UNTIED, read
from benchmarks.layout_runs import _actor, _load, _save, mini_batches
from megatron_occ.losses.heads import LossReport
from megatron_occ.losses.joint import JointLoss
from megatron_occ.losses.regime import Regime
from megatron_occ.mcore.micro_batches import MiniBatchPlacer
from megatron_occ.mcore.startup import initialize
from megatron_occ.mcore.training import run_mini_batch
from megatron_occ.rl.prepared import PreparedBatch
from megatron_occ.rl.update import PolicyUpdater, policy_settings
from tests.mcore.distributed import run_ranks

EXACT = (
    "mtp.preset=occ_exact",
    "mtp.trunk.exact.every=1",
    "mtp.trunk.exact.gate=0",
    "mtp.trunk.exact.share_cap=null",
    "mtp.trunk.lambda_plus=0.5",
    "mtp.trunk.clamp=[null,null]",
)
EUCLIDEAN = "mtp.trunk.exact.metric=euclidean"
LAYERS = "mtp.trunk.exact.per=layer"
COUPLED = ("mtp.preset=occ", "mtp.trunk.estimator=exact", "mtp.trunk.ema=0.9")
MODELS = {
    "dense": (*EXACT, "mtp.num_layers=1", EUCLIDEAN),
    "adam": (*EXACT, "mtp.num_layers=1"),
    "layers": (*EXACT, "mtp.num_layers=2", EUCLIDEAN, LAYERS, *UNTIED),
    "coupled": (*COUPLED, *EXACT[1:], "mtp.num_layers=2", EUCLIDEAN),
    "moe": (
        *EXACT,
        "mtp.num_layers=1",
        EUCLIDEAN,
        "model.moe.num_experts=4",
        "model.moe.top_k=2",
        "model.moe.ffn_hidden_size=24",
        "model.moe.first_dense_layers=1",
        "model.moe.score_function=sigmoid",
        "model.moe.expert_bias=true",
        "model.moe.bias_update_rate=0.01",
    ),
}
OVERLAP = "parallel.overlap_grad_reduce=true"
SHARDED = "parallel.distributed_optimizer=true"
LAYOUTS = [
    ("dense", TP2),
    ("dense", PP2),
    ("dense", "parallel.virtual_pipeline=1"),
    ("dense", CP2, *PACKED),
    ("dense", OVERLAP),
    ("adam", SHARDED, OVERLAP),
    ("adam", TP2, "parallel.sequence=true"),
    ("layers", PP2, *PACKED),
    ("coupled", PP2, OVERLAP),
    ("moe", "parallel.expert=2"),
]
# of products of two gradients, each to 8 units of rounding as in assert_same_up_to_rounding
LIMIT = 16 * torch.finfo(torch.float32).eps


def pieces(updater):
    """Loss functions of RL alone and of each MTP depth alone."""
    policy = policy_settings(updater.config)
    alone = JointLoss(policy, Regime(trunk="none", head="none"))

    def rl(outputs, targets, counts):
        return alone(outputs, targets, counts)[0]

    def mtp(depth, outputs, targets, counts):
        return updater.loss.trunk_losses(outputs, targets, counts)[depth]

    depths = range(updater.actor.num_depths)
    return [(rl, ())] + [(functools.partial(mtp, k), ((True, True),)) for k in depths]


def groups(actor):
    """Number of the group of each trunk parameter of one process, by name."""
    last = actor.config.model.num_layers + 1
    found = {}
    for name, _ in actor.chunks[0].named_parameters():
        if name.startswith("mtp."):
            continue
        layer = name.split(".")[2] if name.startswith("decoder.layers.") else None
        found[name] = int(layer) + 1 if layer else 0 if name.startswith("embedding") else last
    return found


def brute_force(updater, batch, part):
    """Trunk gradients of a part by separate backward passes, [1+K][name]; nothing stays."""
    actor, (chunk,) = updater.actor, updater.actor.chunks
    prepared = PreparedBatch(updater.config, actor, batch)
    placer = MiniBatchPlacer(updater.config, actor.layout)
    counts = prepared.normalizers
    buffers = [(b, b.clone()) for b in chunk.buffers()]
    gradients = []
    for loss, passes in pieces(updater):
        placed = placer.place(prepared.micro_batches(part, passes=passes))
        run_mini_batch(actor.wrapped, placed, lambda o, t, f=loss: (f(o, t, counts), LossReport()))
        gradients.append({n: p.main_grad.double().clone() for n, p in chunk.named_parameters()})
        for buffer, before in buffers:
            buffer.copy_(before)
    return gradients


def multiplied(actor, left, right, metric):
    """[1+K, 1+K, G] with plain sums."""
    result = torch.zeros(len(left), len(right), actor.config.model.num_layers + 2)
    result, parameters = result.double(), dict(actor.chunks[0].named_parameters())
    for name, group in groups(actor).items():
        weight = torch.ones(())
        if metric == "adam":
            (part,) = actor.optimizer.megatron.chained_optimizers
            moment = part.optimizer.state[parameters[name]]["exp_avg_sq"].double()
            corrected = moment / (1 - 0.95**actor.version)
            weight = 1 / (corrected.sqrt() + 1.0)
        for i, a in enumerate(left):
            for j, b in enumerate(right):
                result[i, j, group] += (a[name] * b[name] * weight).sum()
    return result


def oracle(model, folder):
    """Products of each update of one process, taken before it."""
    config = read(model)
    initialize(config)
    actor = _actor(config)
    _save(actor, folder / "start")
    updater, found, metrics = PolicyUpdater(config, actor), [], []
    metric = config.mtp.trunk.exact.metric
    for step in range(3):
        batch = mini_batches(config, actor, parts=2)[step % 2]
        if metric == "euclidean" or step > 0:
            first, second = (brute_force(updater, batch, part) for part in (0, 1))
            whole = [{n: a[n] + b[n] for n in a} for a, b in zip(first, second, strict=True)]
            mixed = multiplied(actor, first, second, metric)
            cross = 2 * (mixed + mixed.transpose(0, 1))
            found.append((multiplied(actor, whole, whole, metric), cross))
        metrics.append(updater.run_update(batch).metrics)
    return found, metrics


def run_layout(model, layout, folder):
    """Products and metrics of the same updates by a layout."""
    config = read(model, layout)
    initialize(config)
    actor = _actor(config)
    _load(actor, folder / "start")
    actor.optimizer.megatron.reload_model_params()
    updater, products, metrics = PolicyUpdater(config, actor), [], []
    take = updater.exact._calibrator.update

    def watched(sample):
        products.append((sample.same, sample.cross))
        return take(sample)

    updater.exact._calibrator.update = watched
    for step in range(3):
        metrics.append(updater.run_update(mini_batches(config, actor, parts=2)[step % 2]).metrics)
    return products, metrics


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp("oracle")
        (result,) = run_ranks(oracle, 1, MODELS[name], folder)
        return *result, folder

    return of


def assert_close(found, expected, what):
    """Relative to the product of the norms, which is what rounding scales with."""
    norms = expected.sum(-1).diagonal().clamp(min=0).sqrt()
    scale = norms.unsqueeze(1) * norms.unsqueeze(0)
    if found.size(-1) == 1:
        expected = expected.sum(-1, keepdim=True)
    deviation = ((found - expected).abs() / scale.unsqueeze(-1)).max()
    assert deviation < LIMIT, (what, float(deviation))


@pytest.mark.parametrize(("name", "layout"), [(name, rest) for name, *rest in LAYOUTS])
def test_products_equal_separate_backward_passes(oracles, name, layout):
    expected, metrics, folder = oracles(name)
    results = run_ranks(run_layout, 2, MODELS[name], tuple(layout), folder)
    for products, lines in results:
        assert len(products) == len(expected) >= 2
        for (same, cross), (wanted, crossed) in zip(products, expected, strict=True):
            assert_close(same, wanted, "same")
            # relative to the gradients within the mini-batch, which rounding scales with
            norms = wanted.sum(-1).diagonal().sqrt()
            crossed = crossed if cross.size(-1) > 1 else crossed.sum(-1, keepdim=True)
            deviation = (cross - crossed).abs() / (norms.unsqueeze(1) * norms)[..., None]
            assert deviation.max() < LIMIT, float(deviation.max())
        for line, single in zip(lines, metrics, strict=True):
            assert line.keys() == single.keys()
            for key in single:
                assert line[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), key
