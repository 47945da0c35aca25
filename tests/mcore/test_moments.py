"""Adam's moments in bf16, by a stand-in of TransformerEngine's Adam."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.layout_cases import DENSE, read
from megatron_occ.config import load_config
from megatron_occ.losses.heads import LossReport
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_checkpoint
from megatron_occ.mcore.moments import MOMENTS, moments_of
from megatron_occ.mcore.optimizer_state import _span, main_parameters
from megatron_occ.mcore.startup import initialize, shutdown
from tests.mcore.conftest import VOCABULARY, random_ids, small_config, write_checkpoint
from tests.mcore.distributed import run_ranks
from tests.mcore.fused_adam import FusedAdam, transformer_engine
from tests.mcore.test_checkpoint_layouts import META, OPTIMIZER, Run, all_of, fresh_groups

SPLIT = "parallel.distributed_optimizer=true"
LOW = (SPLIT, "parallel.moments_dtype=bf16")
BETAS, LR, EPS, DECAY = (0.8, 0.9), 0.01, 1e-3, 0.1
# a bf16 number has 8 bits
ULP = 2.0**-8


@contextlib.contextmanager
def made(*given, clip=0.0, head_clip=0.0, beta1=BETAS[0]):
    """The actor of a small model on one process."""
    config = small_config()
    settings = load_config([], list(given))
    config.precision, config.parallel = settings.precision, settings.parallel
    config.mtp.head.clip_grad = head_clip
    adam = config.rl.optimizer
    adam.lr, adam.beta1, adam.beta2, adam.eps = LR, beta1, BETAS[1], EPS
    adam.weight_decay, adam.clip_grad = DECAY, clip
    layout = initialize(config)
    try:
        with transformer_engine():
            actor = MegatronGPTActor(config, VOCABULARY, layout, optimizer=adam, total_updates=8)
        yield actor
    finally:
        shutdown()


def update(actor, seed=1, mix=None):
    batch = actor.micro_batch(random_ids(seed=seed), None, passes=((False, True),))
    actor.get_loss_and_metrics([batch], lambda outputs, _: _report(outputs))
    return actor.finish_training_step(mix)


def _report(outputs):
    values = [outputs.logprobs, *outputs.passes]
    return sum(value.mean() for value in values), LossReport({}, None)


def places(actor):
    """(name, main weight, its optimizer)"""
    names = {id(p): name for name, p in actor.chunks[0].named_parameters()}
    for part in actor.optimizer.megatron.chained_optimizers:
        for parameter, main in main_parameters(part):
            yield names[id(parameter)], main, part


def moments(actor):
    return {name: moments_of(part, main) for name, main, part in places(actor)}


def test_moments_are_kept_in_bf16_and_main_weights_where_they_were():
    with made("precision=bf16", *LOW) as actor:
        update(actor)
        for _, main, part in places(actor):
            assert isinstance(part.optimizer, FusedAdam)
            assert not part.optimizer.use_decoupled_grad and not part.optimizer.master_weights
            assert main.dtype == torch.float32
            assert "master_param" not in part.optimizer.state[main]
            found = moments_of(part, main)
            assert [found[name].dtype for name in MOMENTS] == [torch.bfloat16] * 2
            assert all((moment != 0).any() for moment in found.values())
    with made("precision=bf16", SPLIT) as actor:
        update(actor)
        assert {m["exp_avg"].dtype for m in moments(actor).values()} == {torch.float32}


def adam(weight, gradients, decay, rounded):
    """By hand: arXiv 1412.6980, algorithm 1, decoupled decay, moments rounded after an update."""
    (beta1, beta2), first, second = BETAS, 0.0, 0.0
    for step, g in enumerate(gradients, start=1):
        first, second = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g**2
        root = (second / (1 - beta2**step)).sqrt()
        weight = weight - LR * (first / (1 - beta1**step) / (root + EPS) + decay * weight)
        first, second = rounded(first), rounded(second)
    return weight, first, second


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_updates_are_adams_with_moments_rounded_after_each(precision):
    def note():
        gradients.append({name: main.grad.double() for name, main, _ in places(actor)})

    gradients = []
    with made(f"precision={precision}", *LOW) as actor:
        start = {name: main.detach().double().clone() for name, main, _ in places(actor)}
        for seed in range(3):
            update(actor, seed, note)
        matrices = {name for name, p in actor.chunks[0].named_parameters() if p.dim() > 1}
        unlike, equal = 0.0, []
        for name, main, part in places(actor):
            given = (start[name], [each[name] for each in gradients], DECAY * (name in matrices))
            weight, *expected = adam(*given, lambda moment: moment.bfloat16().double())
            for key, value in zip(MOMENTS, expected, strict=True):
                found, bound = moments_of(part, main)[key].double(), 2 * ULP * value.abs().max()
                # fp32 rounds a few to the next number
                assert (found - value).abs().max() <= bound
                equal.append(found == value)
            error = (main.double() - weight).abs()
            assert error.median() < 1e-7 and error.max() < 2 * ULP * LR
            exact, *_ = adam(*given, lambda moment: moment)
            unlike = max(unlike, float((main.double() - exact).abs().median()))
        assert torch.cat(equal).double().mean() > 0.99
        assert unlike > 1e-6


def test_trunk_and_head_are_clipped_apart():
    # without a first decay the first moment is the gradient that Adam got
    with made(*LOW, clip=0.01, head_clip=0.002, beta1=0.0) as actor:
        report = update(actor)
        assert report.trunk_norm > 0.01 and report.head_norm > 0.002
        squares = {True: 0.0, False: 0.0}
        heads = {name: hasattr(p, "is_mtp_head") for name, p in actor.chunks[0].named_parameters()}
        for name, found in moments(actor).items():
            squares[heads[name]] += float(found["exp_avg"].double().square().sum())
        assert squares[False] ** 0.5 == pytest.approx(0.01, rel=1e-3)
        assert squares[True] ** 0.5 == pytest.approx(0.002, rel=1e-3)


def test_an_update_without_a_finite_gradient_leaves_all_as_it_is():
    def spoil():
        next(main for _, main, _ in places(actor)).grad[3] = torch.inf

    def state():
        mains = [main.detach().clone() for _, main, _ in places(actor)]
        return mains + [m.clone() for found in moments(actor).values() for m in found.values()]

    with made("precision=bf16", *LOW) as actor:
        update(actor)
        before = state()
        assert update(actor, 2, spoil).skipped
        assert all(torch.equal(*pair) for pair in zip(before, state(), strict=True))
        assert not update(actor, 2).skipped
        assert not all(torch.equal(*pair) for pair in zip(before, state(), strict=True))


def test_a_trial_of_updates_leaves_nothing_behind():
    with made("precision=bf16", *LOW) as actor:
        update(actor)
        with actor.restored():
            update(actor, 2)
        with actor.restored():
            update(actor, 3)
        update(actor, 4)
        found = [main.detach().clone() for _, main, _ in places(actor)]
    with made("precision=bf16", *LOW) as actor:
        update(actor)
        update(actor, 4)
        assert all(
            torch.equal(mine, main) for mine, (_, main, _) in zip(found, places(actor), strict=True)
        )


def test_adams_metric_divides_by_the_moments_that_are_kept():
    with made(*LOW) as actor:
        update(actor)
        batch = actor.micro_batch(random_ids(seed=2), None, passes=((False, True),))
        actor.get_loss_and_metrics([batch], lambda outputs, _: _report(outputs))
        gradient = actor.gradient_space.take()
        found = actor.gradient_space.products([gradient], [gradient], "adam").sum()
        expected = 0.0
        for part, (_, main, own) in zip(gradient.parts, places(actor), strict=True):
            if part is not None:
                second = moments_of(own, main)["exp_avg_sq"].double()
                root = (second / (1 - BETAS[1])).sqrt() + EPS
                expected += float((part.double().square() / root)[second > 0].sum())
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_moments_that_were_never_used_are_zeros_of_an_adam_that_can_go_on():
    """As what a checkpoint is read into."""
    found = []
    for early in (False, True):
        with made("precision=bf16", *LOW) as actor:
            if early:
                with actor.restored():
                    assert all(
                        not m.any() for each in moments(actor).values() for m in each.values()
                    )
            update(actor)
            found.append([main.detach().clone() for _, main, _ in places(actor)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@dataclass
class State:
    """By parameter: moments and main weight, whole; the run's count; log-probs after more updates.

    With a distributed optimizer over several ranks, of this rank's entries alone, and their span.
    """

    tensors: dict[str, tuple[Tensor, Tensor, Tensor]]
    spans: dict[str, slice]
    updates: int
    after: Tensor


def state_of(run):
    actor, names = run.actor, {}
    names = {id(p): name for name, p in actor.chunks[0].named_parameters()}
    tensors, spans = {}, {}
    for part in actor.optimizer.megatron.chained_optimizers:
        for parameter, main in main_parameters(part):
            name, found = names[id(parameter)], moments_of(part, main)
            tensors[name] = tuple(t.detach().clone() for t in (*found.values(), main))
            if hasattr(part, "model_param_gbuf_map"):
                spans[name] = _span(part, parameter)
    run.update(1)
    return State(tensors, spans, actor.optimizer.updates, run.logprobs())


def save_or_load(saves, given, folder):
    """A run's state at a checkpoint that it writes, or reads."""
    with fresh_groups(), transformer_engine():
        run = Run(read((*DENSE, *OPTIMIZER, "mtp.num_layers=1"), given))
        if saves:
            run.update(2)
            write_checkpoint(folder, 2, run.actor, {"updater": run.updater.state_dict()}, META)
        else:
            trainer = load_checkpoint(folder / "step_000002", run.actor, META)
            run.updater.load_state_dict(trainer["updater"])
        return state_of(run)


FULL = (SPLIT, "precision=bf16")
BF16 = (*FULL, "parallel.moments_dtype=bf16")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """[ranks][name]: written as "full" and "low" on one process and "spread" on two, and read."""
    folder = tmp_path_factory.mktemp("moments")
    full, low, spread = (folder / name for name in ("full", "low", "spread"))
    one = {
        "full": (save_or_load, True, FULL, full),
        "low": (save_or_load, True, BF16, low),
        "low to low": (save_or_load, False, BF16, low),
        "low to full": (save_or_load, False, FULL, low),
        "low to plain": (save_or_load, False, ("precision=bf16",), low),
        "full to low": (save_or_load, False, BF16, full),
    }
    two = {
        "spread": (save_or_load, True, BF16, spread),
        "low to spread": (save_or_load, False, BF16, low),
    }
    (found,) = run_ranks(all_of, 1, list(one.values()), timeout=300)
    by_rank = run_ranks(all_of, 2, list(two.values()), timeout=300)
    (last,) = run_ranks(all_of, 1, [(save_or_load, False, BF16, spread)], timeout=300)
    found = [[state] for state in (*found, *last)]
    names = (*one, "spread to low", *two)
    return dict(zip(names, (*found, *zip(*by_rank, strict=True)), strict=True))


def same(found, expected, rounded=lambda tensor: tensor):
    assert found.updates == expected.updates == 3
    for name, (*moments_, main) in expected.tensors.items():
        span = found.spans.get(name, slice(None))
        if name not in found.tensors:
            continue
        *mine, own = (tensor.flatten() for tensor in found.tensors[name])
        for moment, wanted in zip(mine, moments_, strict=True):
            assert torch.equal(moment, rounded(wanted.flatten()[span]).to(moment.dtype))
        assert torch.equal(own, main.flatten()[span])


def test_a_checkpoint_holds_moments_to_the_bit(states):
    (low,) = states["low"]
    assert {m.dtype for *found, _ in low.tensors.values() for m in found} == {torch.bfloat16}
    (again,) = states["low to low"]
    same(again, low)
    assert torch.equal(again.after, low.after)


@pytest.mark.parametrize("name", ["low to full", "low to plain"])
def test_moments_in_bf16_are_read_as_they_are_into_fp32(states, name):
    (found,), (low,) = states[name], states["low"]
    assert {m.dtype for *found, _ in found.tensors.values() for m in found} == {torch.float32}
    same(found, low)
    # an update of the same moments, which rounds them behind it
    assert torch.equal(found.after, low.after)


def test_moments_in_fp32_are_rounded_when_they_are_read(states):
    (found,), (full,) = states["full to low"], states["full"]
    same(found, full, lambda tensor: tensor.bfloat16())
    assert any(
        not torch.equal(m, m.bfloat16()) for *found, _ in full.tensors.values() for m in found
    )


def test_moments_in_bf16_go_from_layout_to_layout(states):
    (low,), (joined,) = states["low"], states["spread to low"]
    entries = {name: 0 for name in low.tensors}
    for mine, written in zip(states["low to spread"], states["spread"], strict=True):
        same(mine, low)
        for name, (*_, main) in mine.tensors.items():
            entries[name] += main.numel()
        for name, tensors in written.tensors.items():
            for tensor, whole in zip(tensors, joined.tensors[name], strict=True):
                assert torch.equal(tensor.flatten(), whole.flatten()[written.spans[name]])
    assert entries == {name: main.numel() for name, (*_, main) in low.tensors.items()}
