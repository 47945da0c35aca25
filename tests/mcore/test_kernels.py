"""Attention that reads each row's own length, against masks; and which kind is taken."""

from __future__ import annotations

import inspect
import logging
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_occ.mcore.inference import engine as engine_module
from megatron_occ.mcore.inference import kernels
from megatron_occ.mcore.inference.attend import BySpans
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.inference.kernels import (
    ByBlocks,
    ByRowLengths,
    Shapes,
    choose_attention,
    flash_attention,
    torch_flash,
    trial,
)
from megatron_occ.mcore.inference.room import Room
from tests.mcore.test_generation import make_engine, prompts, requests, respond, settings
from tests.mcore.test_speculation import KINDS, model_of

CPU = torch.device("cpu")
MANY, ONE, LATENT = Shapes(4, 1, 16), Shapes(2, 3, 16), Shapes(1, 6, 24)


def plain_kernel(query, key, value, lengths, scale, table=None):
    """What kernels by row length promise, row by row; a token that sees nothing gets zeros."""
    if table is not None:
        assert table.dtype == torch.int32 and len(table) == len(query)
        key, value = (each[table.long()].flatten(1, 2) for each in (key, value))
    found = torch.zeros(*query.shape[:3], value.size(-1), dtype=query.dtype)
    share = query.size(2) // key.size(2)
    for row, length in enumerate(lengths.tolist()):
        for place in range(query.size(1)):
            end = length - query.size(1) + place + 1
            if end > 0:
                mine = [each[row, :end].transpose(0, 1) for each in (key, value)]
                mine = [each.repeat_interleave(share, 0) for each in mine]
                one = query[row, place].unsqueeze(1)
                found[row, place] = functional.scaled_dot_product_attention(
                    one, *mine, scale=scale
                ).squeeze(1)
    return found


def kinds():
    return ByRowLengths("plain", plain_kernel), ByBlocks(compiled=False)


@pytest.mark.parametrize("shapes", [MANY, ONE, LATENT])
@pytest.mark.parametrize("each", [1, 2, 4, 150])
@pytest.mark.parametrize("attention", kinds(), ids=lambda kind: kind.name)
def test_contexts_are_those_of_masks(shapes, each, attention):
    draw = torch.Generator().manual_seed(each)
    rows, length = 5, 300
    last = torch.randint(0, length, (rows,), generator=draw)
    last[:2] = torch.tensor((0, length - 1))
    size = (rows + 2, length, shapes.groups, 1 if shapes is LATENT else 2, shapes.width)
    kept = torch.randn(size, generator=draw)
    for row, end in enumerate(last.tolist()):
        # what lies behind a row's end belongs to nobody
        kept[row, end + 1 :] = 1e4
    query = torch.randn(rows, each, shapes.groups, shapes.share, shapes.width, generator=draw)
    positions = (last.unsqueeze(1) + torch.arange(1 - each, 1)).clamp_(min=0)
    masks = BySpans(shapes.share, dtype=torch.float32, device=CPU)
    room = Room(rows + 2, length, CPU)
    for scale in (None, 0.3):
        found, expected = (
            kind.look(positions, last.numpy(), room, repeats=True)(query, kept, scale)
            for kind in (attention, masks)
        )
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", kinds(), ids=lambda kind: kind.name)
def test_the_engine_responds_as_with_masks(layout, kind, attention):
    model, drafts = model_of(layout, kind), Speculation(3)
    expected = respond(model, prompts(), slots=4, speculation=drafts)
    engine = make_engine(model, slots=4, speculation=drafts)
    engine._attention = attention
    found = engine.generate(requests(prompts()), settings())
    assert found.tokens == expected.tokens
    assert found.drafts == expected.drafts
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_tokens_at_repeated_positions_get_what_the_last_of_them_gets():
    """Short rows in a long catch-up: a kernel lets the first of them see nothing."""
    attention = ByRowLengths("plain", plain_kernel)
    kept = torch.randn(2, 10, 1, 1, 4)
    query = torch.ones(2, 4, 1, 1, 4)
    positions = torch.tensor([[0, 0, 0, 1], [3, 4, 5, 6]])
    look = dict(last=np.array([1, 6]), room=Room(2, 10, CPU))
    found = attention.look(positions, **look, repeats=True)(query, kept)
    assert torch.equal(found[0, 0], found[0, 2])
    torch.testing.assert_close(found[0, 0, 0, 0], kept[0, 0, 0, 0])
    other = attention.look(positions, **look, repeats=False)(query, kept)
    assert torch.equal(other[0, 0], torch.zeros(1, 1, 4))
    assert torch.equal(other[1], found[1])


def chosen(caplog, *, dtype=torch.float32, paged=False):
    """On a device that says it is a GPU, and computes here."""
    caplog.set_level(logging.INFO)

    class Pretended:
        type = "cuda"

    found = choose_attention(ONE, dtype=dtype, device=Pretended(), paged=paged)
    return found.name, caplog.text


@pytest.fixture
def on_host(monkeypatch):
    """Trials run here, whatever the device is called."""
    own = kernels.trial
    monkeypatch.setattr(
        kernels,
        "trial",
        lambda kind, shapes, device, **how: own(kind, shapes, device=CPU, **how),
    )
    masks = kernels.BySpans
    monkeypatch.setattr(
        kernels, "BySpans", lambda share, dtype, device: masks(share, dtype=dtype, device=CPU)
    )


def offer(monkeypatch, *made):
    named = [(f"number {i}", make) for i, make in enumerate(made)]
    monkeypatch.setattr(kernels, "candidates", lambda: iter(named))


def test_the_first_kernel_that_agrees_is_taken(monkeypatch, caplog, on_host):
    def missing():
        raise ImportError("no such thing")

    def wrong(*given):
        return plain_kernel(*given) * 1.01

    def nothing(*given):
        return plain_kernel(*given) * torch.nan

    made = [
        ByRowLengths(name, k) for name, k in (("w", wrong), ("n", nothing), ("p", plain_kernel))
    ]
    offer(monkeypatch, missing, *[lambda m=m: m for m in made])
    name, text = chosen(caplog)
    assert name == "p"
    assert "no number 0: no such thing" in text
    assert "no number 1: it is off by" in text
    assert "no number 2: it is off by inf" in text
    assert "attention by number 3" in text


def test_masks_are_taken_where_nothing_else_works(monkeypatch, caplog, on_host):
    offer(monkeypatch)
    name, text = chosen(caplog)
    assert name == BySpans.name
    assert f"attention by {name}" in text


def test_a_processor_attends_by_masks():
    found = choose_attention(ONE, dtype=torch.float32, device=CPU)
    assert isinstance(found, BySpans)


def test_what_flash_attention_is_asked(monkeypatch):
    """Its signature as of version 2: the cache's own rows, lengths, and which token sees what."""

    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        *,
        cache_seqlens,
        softmax_scale,
        causal,
        block_table=None,
    ):
        assert causal
        assert len(q) == len(k_cache if block_table is None else block_table)
        return plain_kernel(q, k_cache, v_cache, cache_seqlens, softmax_scale, block_table)

    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attention = ByRowLengths("flash", flash_attention())
    for paged in (False, True):
        assert trial(attention, ONE, dtype=torch.float32, device=CPU, paged=paged) < 1e-5


@pytest.mark.parametrize("shapes", [MANY, ONE])
def test_what_torch_is_asked(monkeypatch, shapes):
    """Its kernel has no CPU version: what it does, in its place."""

    def ragged(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale=None, seqused_k=None, block_table=None,
    ):  # fmt: skip
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, True, False)
        if block_table is not None:
            # rows one after the other, each as long as its pages
            key, value = (each[block_table.long()].flatten(0, 2) for each in (key, value))
        found = []
        for row, length in enumerate(seqused_k.tolist()):
            mine = slice(cum_seq_q[row], cum_seq_q[row + 1])
            theirs = slice(cum_seq_k[row], cum_seq_k[row + 1])
            assert (mine.stop - mine.start, theirs.stop - theirs.start) == (max_q, max_k)
            one = [each.unsqueeze(0) for each in (query[mine], key[theirs], value[theirs])]
            found.append(plain_kernel(*one, torch.tensor([length]), scale)[0])
        return torch.cat(found), None, None, None, None

    schema = torch.ops.aten._flash_attention_forward.default._schema
    known = [each.name for each in schema.arguments]
    asked = list(inspect.signature(ragged).parameters)
    assert known[: len(asked) - 3] == asked[:-3]
    assert set(asked) < set(known)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", ragged)
    attention = ByRowLengths("torch's flash", torch_flash())
    for paged in (False, True):
        assert trial(attention, shapes, dtype=torch.float32, device=CPU, paged=paged) < 1e-5


def test_a_kernel_that_reads_no_pages_is_not_taken_for_them(monkeypatch, caplog, on_host):
    def whole_rows(query, key, value, lengths, scale, table):
        return plain_kernel(query, key[: len(query)], value[: len(query)], lengths, scale)

    def made():
        return ByRowLengths("whole rows", whole_rows)

    offer(monkeypatch, made, lambda: ByBlocks(compiled=False))
    assert chosen(caplog)[0] == "whole rows"
    offer(monkeypatch, made, lambda: ByBlocks(compiled=False), lambda: kinds()[0])
    name, text = chosen(caplog, paged=True)
    assert name == "plain"
    assert "no number 1: pages are not read by FlexAttention" in text


def test_an_engine_chooses_once(layout, monkeypatch):
    choices = []
    own = engine_module.choose_attention
    monkeypatch.setattr(
        engine_module, "choose_attention", lambda *a, **k: choices.append(a) or own(*a, **k)
    )
    engine: MegatronEngine = make_engine(model_of(layout, "mla"), slots=4)
    for _ in range(2):
        engine.generate(requests(prompts()), settings())
    assert choices == [(Shapes(1, 4, 12),)]
