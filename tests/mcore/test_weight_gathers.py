"""Gathers that run beside the next forward pass: nobody reads a weight that is still on its way.

Each gather is made late: until it is waited for, what other ranks send is no number.
"""

from __future__ import annotations

import functools

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from benchmarks.layout_cases import COUPLED, DENSE, HEAD, MOE, PACKED, PP2, SPLIT, UNTIED, read
from benchmarks.layout_runs import VOCABULARY, _actor, mini_batches
from megatron_occ.config import validate
from megatron_occ.losses.heads import LossReport
from megatron_occ.mcore import provider
from megatron_occ.mcore.checkpoint import model_state, read_plain
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.head_update import build_updater
from megatron_occ.rl.pretraining import PretrainTrainer
from megatron_occ.rollout import EngineError, Request, SamplingSettings
from tests.mcore.conftest import write_checkpoint
from tests.mcore.distributed import run_ranks
from tests.mcore.test_exact import MODELS as EXACT

OVERLAP = "parallel.overlap_param_gather=true"
TWO_DEPTHS = ("mtp.num_layers=2",)
VPP2 = "parallel.virtual_pipeline=2"
EP2 = "parallel.expert=2"
META = {"model": {}, "mtp_layers": 0, "tokenizer": {}}


class Late:
    """A gather that has arrived when it is waited for, and not before."""

    def __init__(self, group):
        group.param_gather_handle.wait()
        ranks = group.intra_distributed_optimizer_instance_group
        self.arrived = []
        for bucket in group.buckets:
            memory = bucket.param_data
            self.arrived.append((memory, memory.clone()))
            own = memory.chunk(ranks.size())[ranks.rank()].clone()
            memory.fill_(torch.nan).chunk(ranks.size())[ranks.rank()].copy_(own)

    def wait(self):
        for memory, values in self.arrived:
            memory.copy_(values)


# groups of this process, as their gathers began
STARTED = []


def make_late():
    """For this process."""
    start = _ParamAndGradBucketGroup.start_param_sync

    def start_late(group, *arguments, **named):
        start(group, *arguments, **named)
        STARTED.append(group)
        if group.param_gather_handle is not None:
            group.param_gather_handle = Late(group)

    _ParamAndGradBucketGroup.start_param_sync = start_late


def cut_into_buckets():
    """About one for each layer: Megatron's least size is far above the models of tests."""
    provider.DistributedDataParallelConfig = functools.partial(
        provider.DistributedDataParallelConfig, bucket_size=4000
    )


def start(model, layout, command):
    config = read(model, (*SPLIT, *layout))
    validate(config, command=command, world_size=torch.distributed.get_world_size())
    initialize(config)
    cut_into_buckets()
    if config.parallel.overlap_param_gather:
        make_late()
    return _actor(config)


def weights(actor):
    """As exports and checkpoints see them."""
    return {
        f"{chunk}.{name}": value.data.detach().clone()
        for chunk, values in model_state(actor).items()
        for name, value in values.items()
        if isinstance(value.data, torch.Tensor)
    }


def logprobs(actor, which):
    ids = torch.randint(0, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(3))
    return which(ids, parts=[[0, 1], [2, 3]], lengths=None, temperature=0.8)


def responses(actor):
    depths = actor.num_depths
    engine = MegatronEngine(
        actor.inference_chunks, actor.layout, slots=2, speculation=Speculation(depths)
    )
    prompts = ([3, 4, 5], [7], [9, 8])
    requests = [Request(prompt, 100 + number) for number, prompt in enumerate(prompts)]
    found = engine.generate(requests, SamplingSettings(0.8, 8, stop_ids=(0,)))
    return found.tokens, found.logprobs


def reference(actor):
    actor.keep_reference()
    return logprobs(actor, actor.get_init_policy_logprobs)


def head_of_kept_states(actor):
    """A pass that does without the trunk; there is none in a pipeline."""
    if actor.config.parallel.pipeline > 1:
        return None
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCABULARY, (4, 11), generator=generator)
    states = torch.randn(4, 11, actor.config.model.hidden_size, generator=generator)
    states = states.to(next(actor._chunks[0].parameters()).dtype)
    batch = actor.micro_batch(ids, None, passes=((False, True),), states=states, main_head=False)

    def loss(outputs, _):
        total = outputs.passes[0].sum()
        return total, LossReport({"total": total.detach().double()})

    return actor.get_loss_and_metrics([batch], loss, forward_only=True).metrics


READERS = {
    "weights": weights,
    "log-probs": lambda actor: logprobs(actor, actor.get_inference_log_probs),
    "responses": responses,
    "head of kept states": head_of_kept_states,
    "a new reference policy": reference,
    "weights again": weights,
    "log-probs of the reference policy": lambda actor: logprobs(
        actor, actor.get_init_policy_logprobs
    ),
}


def reinforce(model, layout, folder):
    """Metrics of two mini-batches a step, and what each reader has right after an update."""
    actor = start(model, layout, "rl")
    updater = build_updater(actor.config, actor)
    batches = mini_batches(actor.config, actor, parts=getattr(updater, "parts", 1))
    if actor.config.rl.train_trunk:
        batches = updater.compute_logprobs(batches)
    found = [updater.run_update(batch).metrics for batch in batches * 2]
    for name, read_model in READERS.items():
        found.append(updater.run_update(batches[0]).metrics)
        found.append((name, read_model(actor)))
    with actor.restored():
        found.append(updater.run_update(batches[1]).metrics)
    found.append(weights(actor))
    updater.run_update(batches[1])
    write_checkpoint(folder, 1, actor, {}, META)
    return found, sum(len(chunk.bucket_groups) for chunk in actor.wrapped)


class Words:
    def batch(self, step, size, length):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (size, length), generator=generator)
        return ids, torch.ones(ids.shape)


def pretrain(model, layout, folder):
    given = ("pretrain.steps=4", "pretrain.batch_size=8", "pretrain.micro_batch_size=2")
    actor = start((*model, *given, "pretrain.sequence_length=12"), layout, "pretrain")
    trainer = PretrainTrainer(actor.config, actor, Words(), validate=None, logger=None, save=None)
    found = []
    for trainer.step in range(3):
        found.append(trainer.run_step())
    found += [weights(actor), trainer.run_step(), responses(actor)]
    trainer.run_step()
    write_checkpoint(folder, 1, actor, {}, META)
    return found, sum(len(chunk.bucket_groups) for chunk in actor.wrapped)


def assert_equal(found, expected, place=""):
    """Bit for bit, through lists and dictionaries."""
    assert type(found) is type(expected), place
    if isinstance(found, torch.Tensor):
        assert torch.equal(found, expected), place
        assert torch.isfinite(found.float()).all(), place
    elif isinstance(found, dict):
        assert found.keys() == expected.keys(), place
        for key, value in found.items():
            assert_equal(value, expected[key], f"{place}/{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), place
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{place}/{number}")
    else:
        assert found == expected, place


def compare(run, ranks, model, layout, folder):
    """Buckets of the run with overlap, once all is seen to be equal."""
    plain = run_ranks(run, ranks, model, layout, folder / "plain", timeout=240)
    late = run_ranks(run, ranks, model, (*layout, OVERLAP), folder / "late", timeout=240)
    for (found, _), (expected, _) in zip(late, plain, strict=True):
        assert_equal(found, expected)
    stored = [read_plain(folder / name / "step_000001") for name in ("late", "plain")]
    tensors = [{k: v for k, v in s.items() if isinstance(v, torch.Tensor)} for s in stored]
    assert any("exp_avg" in name for name in tensors[0])
    assert_equal(*tensors)
    return late[0][1]


RUNS = {
    "tied": (reinforce, 2, DENSE + TWO_DEPTHS, ()),
    "untied, packed": (reinforce, 2, DENSE + UNTIED + TWO_DEPTHS, PACKED),
    "16 bits, recompute": (
        reinforce,
        2,
        COUPLED + UNTIED + TWO_DEPTHS,
        ("precision=bf16", "recompute=full"),
    ),
    "head alone": (reinforce, 2, HEAD + TWO_DEPTHS, ()),
    "exact": (reinforce, 2, EXACT["dense"], ()),
    "PP2, tied": (reinforce, 4, DENSE + TWO_DEPTHS, (PP2,)),
    "PP2 x VPP2, untied, packed": (
        reinforce,
        4,
        DENSE + UNTIED + ("mtp.num_layers=1",),
        (PP2, VPP2, *PACKED),
    ),
    "experts over DP2 x EP2": (reinforce, 4, (*MOE, "mtp.num_layers=1"), (EP2,)),
    "pretraining": (pretrain, 2, DENSE + UNTIED + TWO_DEPTHS, ("recompute=full",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_late_weights_is_the_run_without(name, tmp_path):
    run, ranks, model, layout = RUNS[name]
    buckets = compare(run, ranks, model, layout, tmp_path)
    assert buckets > 3 or name == "head alone"


def gathers(model, layout):
    """Which gathers are open behind an update and behind a pass, and how many at each layer."""
    actor = start(model, layout, "rl")
    (wrapped,), (chunk,) = actor.wrapped, actor.chunks

    def open_now():
        return [group.param_gather_handle is not None for group in wrapped.bucket_groups]

    (batch, _) = mini_batches(actor.config, actor)
    build_updater(actor.config, actor).run_update(batch)
    # the last weights of the model are in the first bucket
    assert wrapped.bucket_groups[::-1] == STARTED
    assert chunk.embedding.word_embeddings.weight in STARTED[0].params
    after_update, at_layers = open_now(), []
    for layer in chunk.decoder.layers:
        layer.register_forward_pre_hook(lambda *_: at_layers.append(sum(open_now())))
    logprobs(actor, actor.get_inference_log_probs)
    return after_update, at_layers[: len(chunk.decoder.layers)], open_now()


def test_layers_run_while_later_ones_are_on_their_way():
    for after_update, at_layers, at_end in run_ranks(gathers, 2, DENSE + TWO_DEPTHS, (OVERLAP,)):
        assert all(after_update)
        assert len(after_update) > at_layers[0] > at_layers[1] > at_layers[2] > at_layers[3] > 0
        assert not any(at_end)


def forget(model, layout, what):
    """Whether numbers are lost where one of the waits is left out."""
    actor = start(model, layout, "rl")
    (batch, _) = mini_batches(actor.config, actor)
    build_updater(actor.config, actor).run_update(batch)
    decoder = actor._chunks[0].decoder
    if what == "behind the trunk":
        decoder._forward_hooks.clear()
    elif what == "before layers":
        for layer in decoder.layers:
            layer._forward_pre_hooks.clear()
    else:
        actor.optimizer.finish_gathers = lambda: None
    try:
        found = {
            "before rollouts": responses,
            "before a checkpoint": weights,
        }.get(what, READERS["log-probs"])(actor)
    except EngineError as error:
        return "not finite" in str(error)
    tensors = found.values() if isinstance(found, dict) else [found]
    return not all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.parametrize(
    "what", ["behind the trunk", "before layers", "before rollouts", "before a checkpoint"]
)
def test_a_wait_that_is_left_out_would_be_seen(what):
    """By a rank that does not make the weight itself."""
    assert any(run_ranks(forget, 2, DENSE + UNTIED + TWO_DEPTHS, (OVERLAP,), what))
