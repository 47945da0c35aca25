"""Rollouts that round to FP8, against training passes that round as TransformerEngine does."""

from __future__ import annotations

import pytest
import torch
from megatron.core import dist_checkpointing

from benchmarks.layout_cases import DENSE, TP2, read
from megatron_occ.config import load_config
from megatron_occ.mcore.checkpoint import load_model, model_state
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.inference.layers import Company
from megatron_occ.mcore.inference.rounding import BLOCK, Rounding, rounded, rounding_from
from megatron_occ.mcore.inference.trunk import Trunk
from megatron_occ.mcore.layout import Layout
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import VOCABULARY, build_model, random_ids, small_config
from tests.mcore.distributed import run_ranks
from tests.mcore.fp8_training import by_tiles, fp8_training, whole
from tests.mcore.test_generation import (
    PLAIN,
    make_engine,
    prompts,
    requests,
    settings,
    training_logprobs,
)
from tests.mcore.test_generation_layouts import make_actor
from tests.mcore.test_graphs import TapeCapture, captured
from tests.mcore.test_speculation import drafted, greedy_drafts

__all__ = ["captured", "drafted"]

EVERYWHERE = range(1, 4)
KINDS = ("dense", "biased", "mla", "before the norm")
ENDLESS = dict(stop_ids=(), max_response_length=24)


def model_of(layout, kind="dense", precision="fp32", depths=2):
    """Three layers; blocks of 128 leave a rest of their widths."""
    config = small_config(depths)
    config.precision, model = precision, config.model
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 3, 160, 192
    model.init_std, model.max_position_embeddings = 0.1, 128
    model.mtp_reads = "before" if kind == "before the norm" else "after"
    if kind == "biased":
        model.tie_embeddings, model.qk_layernorm, model.qkv_bias = False, True, True
    if kind == "mla":
        model.num_query_groups = None
        model.mla.enabled, model.mla.q_lora_rank, model.mla.kv_lora_rank = True, 24, 16
        model.mla.qk_head_dim, model.mla.qk_rope_head_dim, model.mla.v_head_dim = 16, 8, 12
    built = build_model(config, VOCABULARY, layout.device)
    if kind == "biased":
        for layer in built.decoder.layers:
            torch.nn.init.normal_(layer.self_attention.linear_qkv.bias, std=0.1)
    return built


def sampled(model, rounding, many=None, *, slots=6, speculation=PLAIN, seeds=None, **changes):
    engine = make_engine(model, slots=slots, speculation=speculation)
    engine.rounding = rounding
    wanted = requests(prompts() if many is None else many, seeds)
    return engine.generate(wanted, settings(**ENDLESS | changes))


def gaps_to_training(model, found, many=None):
    """|log-prob of the rollout - that of the training forward| of all tokens."""
    sequences = [a + b for a, b in zip(many or prompts(), found.tokens, strict=True)]
    ids = torch.full((len(sequences), max(map(len, sequences))), VOCABULARY - 1)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    expected, gaps = training_logprobs(model, ids, head_targets(ids, 0)), []
    for row, tokens, logprobs in zip(expected, sequences, found.logprobs, strict=True):
        end = len(tokens) - 1
        gaps.append((row[end - len(logprobs) : end] - torch.tensor(logprobs)).abs())
    return torch.cat(gaps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(1, 300), (260, 300), (128, 128), (1, 128)])
def test_values_are_rounded_as_e4m3_says(dtype, tile):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(260, 300, generator=generator)
    # as many are below the smallest normal number of their tile
    values *= 10 ** torch.randn(260, 300, generator=generator).mul(2)
    values[:128] *= 1e-20
    values[130], values[131, :128] = 0, 0
    values[132, 5], values[133] = 448, torch.linspace(-448, 448, 300)
    values = values.to(dtype)
    found = rounded(values, *tile)
    assert found.dtype == dtype
    torch.testing.assert_close(found, by_tiles(values, *tile), atol=0, rtol=0)
    assert (found != values).float().mean() > 0.8


def test_tiny_values_do_not_overflow_and_others_do_not_hide():
    tiny = torch.full((2, 4), 1e-39)
    assert rounded(tiny, 1, 4).abs().max() <= 1e-38
    for value in (float("nan"), float("inf")):
        values = torch.ones(2, 4)
        values[0, 1] = value
        found = rounded(values, 1, 4)
        assert not found[0].isfinite().all()
        assert found[1].tolist() == [1.0] * 4


def test_a_token_is_rounded_alike_whatever_is_beside_it():
    """So a scale of its own gives what training's scale of all tokens gives."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(50, 64, generator=generator).mul_(torch.logspace(-1, 1, 50).unsqueeze(1))
    torch.testing.assert_close(
        Rounding(None, EVERYWHERE).inputs(tokens), whole(tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_training_in_fp8(layout, kind, block):
    """In fp32, where nothing else differs.

    Under one scale for all tokens the smallest numbers of a small token have fewer digits.
    """
    model = model_of(layout, kind)
    found, plain = sampled(model, Rounding(block, EVERYWHERE)), sampled(model, None)
    with fp8_training(model, block, EVERYWHERE):
        gaps, before = gaps_to_training(model, found), gaps_to_training(model, plain)
    assert before.mean() > 0.02
    assert gaps.median() < (1e-5 if block else 0.01)
    assert gaps.mean() < (1e-3 if block else 0.2) * before.mean()


@pytest.mark.parametrize("block", [None, BLOCK])
def test_in_bf16_the_gap_shrinks(layout, block):
    model = model_of(layout, precision="bf16", depths=0)
    many = [random_ids(1, 8, seed=row)[0].tolist() for row in range(24)]
    found, plain = (
        sampled(model, rounding, many, slots=24, max_response_length=48)
        for rounding in (Rounding(block, EVERYWHERE), None)
    )
    with fp8_training(model, block, EVERYWHERE):
        gaps, before = gaps_to_training(model, found, many), gaps_to_training(model, plain, many)
    assert gaps.mean() < before.mean() / 2.5


def test_layers_that_stay_in_bf16_read_the_weights_themselves(layout):
    model, middle = model_of(layout), range(2, 3)
    trunk = Trunk(
        [model],
        Company(Layout.of_this_rank(torch.device("cpu"))),
        rounding=Rounding(None, middle),
    )
    for number, layer in enumerate(trunk.layers[0], 1):
        module = model.decoder.layers[number - 1]
        pairs = (
            (layer.attention.qkv, module.self_attention.linear_qkv),
            (layer.attention.out, module.self_attention.linear_proj),
            (layer.mlp.inner, module.mlp.linear_fc1),
            (layer.mlp.down, module.mlp.linear_fc2),
        )
        for mine, theirs in pairs:
            assert (mine.weight.data_ptr() == theirs.weight.data_ptr()) == (number != 2)
            assert (mine.rounding is None) == (number != 2)
    found = sampled(model, Rounding(None, middle))
    gaps = []
    for layers in (middle, EVERYWHERE):
        with fp8_training(model, None, layers):
            gaps.append(gaps_to_training(model, found))
    assert gaps[0].median() < 1e-4
    assert gaps[0].mean() < 0.1 * gaps[1].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_and_company_change_no_token(layout, kind):
    model, rounding = model_of(layout, kind), Rounding(BLOCK, EVERYWHERE)
    whole = sampled(model, rounding)
    assert whole.tokens != sampled(model, None).tokens
    for drafts in (1, 2, 3):
        found = sampled(model, rounding, speculation=Speculation(drafts))
        assert found.tokens == whole.tokens
        assert sum(found.drafts.accepted) > 0
    assert sampled(model, rounding, slots=2).tokens == whole.tokens
    order = [4, 2, 0]
    part = sampled(
        model, rounding, [prompts()[i] for i in order], seeds=[100 + i for i in order], slots=3
    )
    assert part.tokens == [whole.tokens[i] for i in order]


@pytest.mark.parametrize("kind", KINDS)
def test_mtp_layers_draft_as_those_of_training_in_fp8(layout, drafted, kind):
    model = model_of(layout, kind)
    # trunk layers that are not rounded leave MTP layers rounded
    short = dict(temperature=0, max_response_length=8)
    sampled(model, Rounding(None, range(0)), speculation=Speculation(2), **short)
    with fp8_training(model, None, range(0)):
        same = [drafts == greedy_drafts(model, tokens, 2) for tokens, drafts in drafted]
    plain = [drafts == greedy_drafts(model, tokens, 2) for tokens, drafts in drafted]
    assert len(same) > 20
    assert sum(same) > 0.95 * len(same) > sum(plain)


def test_weights_are_rounded_as_they_are_at_a_call(layout):
    model, rounding = model_of(layout), Rounding(None, EVERYWHERE)
    engine = make_engine(model, slots=6)
    engine.rounding = rounding
    before = engine.generate(requests(prompts()), settings(**ENDLESS))
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight.mul_(-1.5)
    after = engine.generate(requests(prompts()), settings(**ENDLESS))
    assert after.tokens != before.tokens
    assert after.logprobs == sampled(model, rounding).logprobs


@pytest.mark.parametrize("kind", ["dense", "mla"])
def test_captured_cycles_find_what_others_find(layout, captured, kind):
    """Each call captures anew, on its own copies of the weights."""
    model, rounding = model_of(layout, kind), Rounding(BLOCK, EVERYWHERE)
    engine = captured(model, slots=6, speculation=Speculation(1))
    engine.rounding = rounding
    for _ in range(2):
        captures = TapeCapture.captured
        found = engine.generate(requests(prompts()), settings(**ENDLESS))
        assert found.tokens == sampled(model, rounding, speculation=Speculation(1)).tokens
        assert TapeCapture.captured > captures
        with torch.no_grad():
            model.decoder.layers[0].mlp.linear_fc1.weight.mul_(1.2)
    assert TapeCapture.replayed > TapeCapture.captured


def responses_of_a_rank(folder, *layout):
    """Tokens and log-probs without drafts and with two; one rank leaves its weights to others."""
    actor = make_actor(read(DENSE, ("mtp.num_layers=2", *layout)))
    if layout:
        load_model(actor, dist_checkpointing.load(model_state(actor), str(folder)))
    else:
        dist_checkpointing.save(model_state(actor), str(folder))
    found = []
    for drafts in (PLAIN, Speculation(2)):
        engine = MegatronEngine(
            actor.inference_chunks,
            actor.layout,
            slots=3,
            speculation=drafts,
            rounding=Rounding(None, range(1, 100)),
        )
        got = engine.generate(requests(prompts()), settings(stop_ids=()))
        found.append((got.tokens, got.logprobs))
    return found


def test_tensor_parallel_ranks_sample_what_one_does(tmp_path):
    """Scales of parts of a weight and of a token are others, and round alike."""
    ((whole, _),) = run_ranks(responses_of_a_rank, 1, tmp_path)
    for plain, speculative in run_ranks(responses_of_a_rank, 2, tmp_path, TP2):
        assert speculative[0] == plain[0] == whole[0]
        for one, other in zip(plain[1], whole[1], strict=True):
            assert one == pytest.approx(other, abs=1e-2)


def test_what_is_rounded_is_what_the_configuration_says():
    given = ["precision=bf16", "model.num_layers=6", "fp8.format=e4m3", "rl.rollout.fp8=true"]
    kept = ["fp8.first_layers_bf16=1", "fp8.last_layers_bf16=2"]
    assert rounding_from(load_config([], given[:-1])) is None
    blocks = load_config([], [*given, "fp8.scaling=block"])
    assert rounding_from(blocks) == Rounding(128, range(1, 7))
    current = load_config([], [*given, "fp8.scaling=current", *kept])
    assert rounding_from(current) == Rounding(None, range(2, 5))
