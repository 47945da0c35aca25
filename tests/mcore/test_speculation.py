"""Drafts by the MTP depths: what comes out is what comes out without them."""

from __future__ import annotations

import random
import threading
import weakref
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.inference import sampler
from megatron_occ.mcore.inference.drafter import Drafter
from megatron_occ.mcore.inference.engine import Speculation
from megatron_occ.mcore.inference.passes import Passes
from megatron_occ.mcore.inference.slots import Verified
from megatron_occ.mcore.inference.trunk import Trunk
from megatron_occ.rl.batch import head_targets
from megatron_occ.rollout import sample_from_uniform, speculative_accept
from megatron_occ.rollout.sampling import cut_log_probs
from tests.mcore.conftest import VOCABULARY, build_model, positions, random_ids, small_config
from tests.mcore.test_generation import (
    LIMIT,
    PLAIN,
    make_engine,
    prompts,
    requests,
    respond,
    settings,
)
from tests.unit.test_rollout_speculative import p_value

KINDS = ("dense", "untied", "moe", "mla", "before the norm")


def model_of(layout, kind="dense", depths=2):
    config = small_config(depths)
    model = config.model
    model.tie_embeddings = kind != "untied"
    model.mtp_reads = "before" if kind == "before the norm" else "after"
    if kind == "untied":
        model.qk_layernorm, model.qkv_bias, model.rotary_percent = True, True, 0.5
    if kind == "moe":
        model.moe.num_experts, model.moe.ffn_hidden_size = 4, 24
    if kind == "mla":
        model.num_query_groups = None
        model.mla.enabled, model.mla.q_lora_rank, model.mla.kv_lora_rank = True, 12, 8
        model.mla.qk_head_dim, model.mla.qk_rope_head_dim, model.mla.v_head_dim = 8, 4, 6
    built = build_model(config, VOCABULARY, layout.device)
    scale_final_norm(built)
    return built


def scale_final_norm(model):
    """Away from ones, where both sides of it look alike to a norm that follows."""
    weight = model.decoder.final_layernorm.weight
    with torch.no_grad():
        weight.copy_(torch.linspace(0.5, 1.5, len(weight)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_coupled_drafts_leave_every_token_as_it_is(layout, kind, length):
    model = model_of(layout, kind)
    plain = respond(model, prompts(), stop_ids=(0,))
    drafted = respond(model, prompts(), stop_ids=(0,), speculation=Speculation(length))
    assert drafted.tokens == plain.tokens
    assert drafted.finish_reasons == plain.finish_reasons
    for one, other in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert drafted.drafts.tokens == plain.drafts.tokens
    assert sum(drafted.drafts.accepted) > 0


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that a call makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_reading_a_prompt_makes_no_tensor_as_large_as_its_square(layout, kind):
    model, prompt = model_of(layout, kind), random_ids(1, 500)[0].tolist()
    with Largest() as largest:
        respond(model, [prompt], max_response_length=1, speculation=Speculation(1))
    assert largest.elements < 500 * 500


@pytest.mark.parametrize("slots", [1, 2, 512])
def test_greedy_drafting_is_greedy_decoding(layout, slots):
    model, arguments = model_of(layout), dict(temperature=0, stop_ids=())
    plain = respond(model, prompts(), **arguments)
    drafted = respond(model, prompts(), slots=slots, speculation=Speculation(3), **arguments)
    assert drafted.tokens == plain.tokens


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_speculative_sampling_does_not_depend_on_the_batch(layout, slots):
    model = model_of(layout)
    drafts = Speculation(2, coupled=False)
    whole = respond(model, prompts(), speculation=drafts)
    cut = respond(model, prompts(), slots=slots, speculation=drafts)
    assert cut.tokens == whole.tokens


def test_an_adaptive_length_changes_no_token(layout):
    model = model_of(layout)
    many = [prompts()[i % 6] for i in range(40)]
    plain = respond(model, many, stop_ids=(0,), slots=5)
    adaptive = respond(
        model, many, stop_ids=(0,), slots=5, speculation=Speculation(3, adaptive=True)
    )
    assert adaptive.tokens == plain.tokens
    # lengths were tried, and not one alone
    assert 0 < adaptive.drafts.proposed[0] < adaptive.drafts.passes


@pytest.fixture
def drafted(monkeypatch):
    """Tokens of a row and what was drafted behind them, for each row of each cycle."""
    seen, original = [], Drafter.draft

    def spy(self, placer, state, ids, known, needed, steps, pick):
        original(self, placer, state, ids, known, needed, steps, pick)
        for row, count in enumerate(known.host.tolist()):
            seen.append((ids[row, :count].tolist(), ids[row, count : count + steps].tolist()))

    monkeypatch.setattr(Drafter, "draft", spy)
    return seen


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_draft_is_what_the_training_forward_of_its_depth_prefers(
    layout, drafted, kind, depths
):
    """Greedy drafts against full forward passes over the committed tokens, cycle by cycle."""
    model = model_of(layout, kind, depths)
    engine = make_engine(model, slots=3, speculation=Speculation(depths))
    engine.generate(requests(prompts()), settings(temperature=0, stop_ids=()))
    assert len(drafted) > 20
    for tokens, drafts in drafted:
        assert drafts == greedy_drafts(model, tokens, depths)


@pytest.mark.parametrize(
    ("kind", "depths"),
    [("dense", 1), ("dense", 3), ("mla", 2), ("moe", 2), ("before the norm", 2)],
)
def test_so_is_each_draft_after_cycles_without_drafts(layout, monkeypatch, drafted, kind, depths):
    """What the depths have not read yet is read in pieces, in rows that come, move and go."""
    monkeypatch.setattr("megatron_occ.mcore.inference.drafter.PIECE", 3)
    monkeypatch.setattr("megatron_occ.mcore.inference.decoding.LOOK_EVERY", 1)
    model, lengths = model_of(layout, kind, depths), random.Random(depths)
    engine = make_engine(model, slots=4, speculation=Speculation(depths))
    choices = [0, 0, 0, 0, 0, 1, depths, depths]
    monkeypatch.setattr(engine.draft_length, "choose", lambda rows: lengths.choice(choices))
    wanted = requests([*prompts(), *prompts()], limits=[24, 3, 30, 7, 2, 40] * 2)
    arguments = settings(temperature=0, stop_ids=(), max_response_length=40)
    found = engine.generate(wanted, arguments)
    assert found.tokens == make_engine(model, slots=1).generate(wanted, arguments).tokens
    assert len(drafted) > 40
    for tokens, drafts in drafted:
        assert drafts == greedy_drafts(model, tokens, len(drafts))


def greedy_drafts(model, tokens, depths):
    """Depth k after ``tokens``, having read the drafts before its own, by training forwards."""
    drafts = []
    for depth in range(1, depths + 1):
        sequence = [*tokens, *drafts]
        place = len(tokens) - 2
        # depth k at position t reads tokens up to t + k and predicts token t + k + 1
        rows = torch.tensor([[*sequence, token] for token in range(VOCABULARY)])
        with torch.no_grad():
            request = HeadRequest(head_targets(rows, model.config.mtp_num_layers))
            outputs = model(rows, positions(rows), None, request=request)
        scores = outputs.passes[0][depth - 1, :, place]
        assert float(scores.exp().sum()) == pytest.approx(1.0, abs=1e-4)
        drafts.append(int(scores.argmax()))
    return drafts


def test_statistics_by_hand(layout):
    """Two drafts a cycle; every cycle is replayed from the greedy response."""
    model = model_of(layout)
    engine = make_engine(model, slots=1, speculation=Speculation(2))
    found = engine.generate(requests(prompts()[:1]), settings(temperature=0, stop_ids=()))
    proposed, accepted, passes, place = [0, 0], [0, 0], 0, 1
    response = found.tokens[0]
    while place < LIMIT:
        drafts = greedy_drafts(model, [*prompts()[0], *response[:place]], 2)
        wanted = response[place : place + 2]
        kept = next((i for i in range(len(wanted)) if drafts[i] != wanted[i]), len(wanted))
        # the limit cuts the response where the drafts alone would fill it
        room = LIMIT - place
        for index in range(2):
            proposed[index] += kept + 1 <= room or index < room
            accepted[index] += index < kept
        passes += 1
        place += min(kept + 1, room)
    counts = found.drafts
    assert (counts.proposed, counts.accepted, counts.passes) == (proposed, accepted, passes)
    assert counts.tokens == LIMIT - 1


def test_prompts_are_read_once_for_all_of_their_samples(layout, monkeypatch):
    model = model_of(layout)
    read, forward = [], Trunk.forward
    monkeypatch.setattr(
        Trunk,
        "forward",
        lambda self, ids, tokens, cache: (
            read.append(ids.size(0)) if tokens.is_causal else None,
            forward(self, ids, tokens, cache),
        )[1],
    )
    grouped = [prompt for prompt in prompts() for _ in range(8)]
    found = respond(model, grouped, slots=4)
    assert sum(read) == len(set(map(tuple, prompts())))
    assert found.tokens == respond(model, grouped).tokens


def test_prompts_that_were_read_make_room_for_the_next_ones(layout, monkeypatch):
    caches, alive, read = [], [], Passes.prefill

    def spy(*args, **kwargs):
        alive.append([cache for cache in caches if cache() is not None])
        prefix = read(*args, **kwargs)
        caches.append(weakref.ref(prefix.cache))
        return prefix

    monkeypatch.setattr(Passes, "prefill", spy)
    respond(model_of(layout), prompts(), slots=1, speculation=Speculation(1))
    assert alive == [[]] * len(prompts())


def test_a_freed_slot_is_filled_at_once(layout, monkeypatch):
    """One long response among short ones: the others go on beside it."""
    model = model_of(layout)
    rows, forward = [], Trunk.forward

    def spy(self, ids, tokens, cache):
        rows.append(ids.size(0) if not tokens.is_causal else 0)
        return forward(self, ids, tokens, cache)

    monkeypatch.setattr(Trunk, "forward", spy)
    limits = [30, *[3] * 27]
    wanted = requests([prompts()[i % 6] for i in range(28)], limits=limits)
    engine = make_engine(model, slots=4)
    found = engine.generate(wanted, settings(stop_ids=(), max_response_length=30))
    assert [len(tokens) for tokens in found.tokens] == limits
    cycles = [count for count in rows if count]
    # 29 + 27 * 2 tokens behind the first ones; the long one alone takes 29 cycles
    assert len(cycles) == 29
    assert sum(cycles) == 29 + 27 * 2
    assert cycles[:18] == [4] * 18


@pytest.mark.parametrize("coupled", [True, False])
def test_logits_a_few_rows_at_a_time_change_nothing(layout, monkeypatch, coupled):
    model = model_of(layout)
    drafts = Speculation(2, coupled=coupled)
    whole = respond(model, prompts(), speculation=drafts)
    most, logits = [], Trunk.logits
    monkeypatch.setattr(
        Trunk, "logits", lambda self, hidden: (most.append(len(hidden)), logits(self, hidden))[1]
    )
    monkeypatch.setattr("megatron_occ.mcore.inference.sampler.CHUNK_LOGITS", 4 * VOCABULARY)
    assert respond(model, prompts(), speculation=drafts).tokens == whole.tokens
    assert max(most) == 4


def test_stop_strings_end_a_response_at_the_token_that_completes_them(layout):
    model = model_of(layout)
    endless = respond(model, prompts(), stop_ids=())
    texts = ["".join(chr(ord("a") + i) for i in tokens) for tokens in endless.tokens]
    stops = (texts[0][3:5], texts[2][-2:])
    for drafts in (Speculation(), Speculation(3)):
        result = respond(model, prompts(), stop_ids=(), stop_strings=stops, speculation=drafts)
        for text, tokens, reason in zip(texts, result.tokens, result.finish_reasons, strict=True):
            ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
            assert len(tokens) == min([*ends, LIMIT])
            assert reason == ("stop" if ends else "length")


def test_stop_strings_need_a_decoder(layout):
    engine = make_engine(model_of(layout), slots=1)
    engine.decode = None
    with pytest.raises(ValueError, match=r"stop_strings=\('a',\).*decode"):
        engine.generate(requests(prompts()), settings(stop_strings=("a",)))


def test_abort_ends_a_call_and_says_which_responses_are_unfinished(layout):
    model = model_of(layout)
    engine = make_engine(model, slots=2, speculation=Speculation(1))
    commits, original = [], threading.Event.is_set

    def is_set(event):
        commits.append(1)
        if len(commits) == 4:
            engine.abort()
        return original(event)

    engine._aborted.is_set = lambda: is_set(engine._aborted)
    found = engine.generate(requests(prompts()), settings(stop_ids=()))
    assert found.finish_reasons.count("abort") >= 4
    whole = respond(model, prompts(), stop_ids=())
    for tokens, full in zip(found.tokens, whole.tokens, strict=True):
        assert tokens == full[: len(tokens)]
    assert any(0 < len(tokens) < LIMIT for tokens in found.tokens)
    again = engine.generate(requests(prompts()), settings(stop_ids=()))
    del engine._aborted.is_set
    assert again.finish_reasons.count("abort") == 0


def test_an_abort_before_a_call_ends_that_call_alone(layout):
    engine = make_engine(model_of(layout), slots=2)
    engine.abort()
    found = engine.generate(requests(prompts()), settings(stop_ids=()))
    assert found.finish_reasons == ["abort"] * len(prompts())
    assert max(map(len, found.tokens)) == 1
    again = engine.generate(requests(prompts()), settings(stop_ids=()))
    assert again.finish_reasons == ["length"] * len(prompts())


CUTS = {"plain": {"temperature": 1.0}, "cut": {"temperature": 0.7, "top_p": 0.9}}


@pytest.mark.parametrize(("coupled", "cut"), product((True, False), CUTS))
def test_the_distribution_of_responses_is_exactly_that_of_the_model(layout, coupled, cut):
    """Pairs of tokens against their probabilities by full passes."""
    counts, expected = pairs_and_probabilities(layout, Speculation(2, coupled=coupled), CUTS[cut])
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("coupled", [True, False])
def test_the_distribution_is_exact_where_some_rows_need_a_second_look(layout, monkeypatch, coupled):
    monkeypatch.setattr(sampler, "LIKELIEST", 4)
    drafts = Speculation(2, coupled=coupled)
    counts, expected = pairs_and_probabilities(layout, drafts, CUTS["cut"])
    assert p_value(counts, expected) > 1e-4


@pytest.mark.parametrize("chunk", [sampler.CHUNK_LOGITS, 2 * VOCABULARY])
def test_a_second_look_changes_no_token_of_rows_that_need_none(layout, monkeypatch, chunk):
    model, cuts = model_of(layout), dict(top_p=0.8, stop_ids=())
    expected = respond(model, prompts(), **cuts)
    looks, own = [], Verified.with_rows
    monkeypatch.setattr(
        Verified, "with_rows", lambda *args: looks.append(args[1].tolist()) or own(*args)
    )
    monkeypatch.setattr(sampler, "LIKELIEST", 4)
    monkeypatch.setattr(sampler, "CHUNK_LOGITS", chunk)
    for drafts in (PLAIN, Speculation(2)):
        found = respond(model, prompts(), speculation=drafts, **cuts)
        assert found.tokens == expected.tokens
        for one, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
    assert any(0 < len(rows) < len(prompts()) for rows in looks)


def test_a_wrong_rule_is_found_out_by_the_same_test(layout, monkeypatch):
    """Drawing from the target itself after a rejection."""

    def wrong(drafts, draft_logprobs, target_logprobs, generator=None, *, uniform=None):
        accepted, _ = speculative_accept(drafts, draft_logprobs, target_logprobs, uniform=uniform)
        rows = torch.arange(len(accepted))
        after = target_logprobs[rows, accepted], uniform[rows, accepted, 1]
        return accepted, sample_from_uniform(*after)

    monkeypatch.setattr("megatron_occ.mcore.inference.sampler.speculative_accept", wrong)
    counts, expected = pairs_and_probabilities(layout, Speculation(2, coupled=False), CUTS["plain"])
    assert p_value(counts, expected) < 1e-6


def pairs_and_probabilities(layout, speculation, cut, rows=12_000):
    """Counts of the second and third token of a response, and the probabilities of such pairs."""
    model, prompt = model_of(layout), prompts()[0]
    engine = make_engine(model, slots=512, speculation=speculation)
    found = engine.generate(
        requests([prompt] * rows), settings(stop_ids=(), max_response_length=3, **cut)
    )
    counts = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for _, second, third in found.tokens:
        counts[second, third] += 1
    after = next_probabilities(model, [prompt], cut)[0]
    two = next_probabilities(model, [[*prompt, a] for a in range(VOCABULARY)], cut)
    three = next_probabilities(
        model, [[*prompt, a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)], cut
    )
    first, second = after.view(-1, 1, 1), two.unsqueeze(-1)
    expected = (first * second * three.view(VOCABULARY, VOCABULARY, -1)).sum(0)
    return _lump(counts.flatten(), expected.flatten())


def next_probabilities(model, sequences, cut):
    """[n, v] of the next token under the settings, by full passes."""
    rows = torch.tensor(sequences)
    found = []
    for token in range(VOCABULARY):
        ids = torch.cat((rows, torch.full((len(rows), 1), token)), dim=1)
        with torch.no_grad():
            request = HeadRequest(head_targets(ids, 0), (), cut["temperature"])
            found.append(model(ids, positions(ids), None, request=request).logprobs[:, -2])
    log_probs = torch.stack(found, dim=1)
    return cut_log_probs(log_probs, settings(**cut)).double().exp()


def _lump(counts, expected):
    """Pairs that are seldom together, so that the approximation of chi-square holds."""
    rare = (expected * counts.sum() < 5) & (expected > 0)
    keep = ~rare
    lumped = [torch.cat((v[keep], v[rare].sum().view(1))) for v in (counts, expected)]
    return lumped[0], lumped[1]
