"""The exported transformers model against ours: logits of every head, and speculative decoding."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.candidate_generator import MTPCandidateGenerator

from benchmarks.peer_weights import export_peer, load_mtp
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import VOCABULARY, build_model, positions, random_ids, small_config

ARCHITECTURES = {
    "grouped": {},
    "every_head_its_own": {"num_query_groups": None},
    "untied_with_bias": {"tie_embeddings": False, "qkv_bias": True, "kv_channels": 16},
}
PROMPT, NEW = 5, 12


@pytest.fixture(params=ARCHITECTURES)
def sides(request, layout, tmp_path):
    config = small_config(depths=2)
    for key, value in ARCHITECTURES[request.param].items():
        setattr(config.model, key, value)
    # other than both sides' defaults
    config.model.rotary_base, config.model.norm_epsilon = 500, 1e-3
    model = build_model(config, VOCABULARY, layout.device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones at first, which one norm in place of another would not change
                parameter.uniform_(0.5, 1.5)
            if "bias" in name:
                parameter.normal_()
    return model, export_peer(model, config, tmp_path / "peer", pad_id=0)


@torch.no_grad()
def test_every_head_gives_our_logits(sides):
    model, peer = sides
    ids, depths = random_ids(), 2
    ours = _our_logprobs(model, ids, depths)
    output = peer(ids, output_hidden_states=True)
    theirs = [output.logits.log_softmax(-1)]
    mtp, hidden = load_mtp(peer), output.hidden_states[-1]
    places = positions(ids)
    for k in range(1, 1 + depths):
        # the query and its key are both at the embedded token's position: attention sees the same
        ahead, hidden = slice(k, None), hidden[:, : ids.size(1) - k]
        hidden = mtp.forward_layer(k - 1, hidden, places[:, ahead], None, input_ids=ids[:, ahead])
        theirs.append(mtp._project_to_logits(hidden).log_softmax(-1))
    for k, (found, expected) in enumerate(zip(theirs, ours, strict=True)):
        length = ids.size(1) - k
        assert found.shape == (len(ids), length, VOCABULARY)
        torch.testing.assert_close(found, expected[:, :length], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generate_drafts_by_our_heads_and_keeps_our_greedy_tokens(sides, monkeypatch):
    model, peer = sides
    drafted = _record_drafts(monkeypatch)
    prompts = random_ids(length=PROMPT)
    settings = dict(max_new_tokens=NEW, do_sample=False)
    plain = peer.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    best = _our_logprobs(model, plain, depths=0)[0].argmax(-1)
    assert plain[:, PROMPT:].tolist() == best[:, PROMPT - 1 : -1].tolist()
    for row, expected in zip(prompts.unsqueeze(1), plain, strict=True):
        found = peer.generate(row, use_mtp=True, **settings)
        assert found[0].tolist() == expected.tolist()
    # depth k drafts from the last state but one, which the main head has used already
    depths = 2
    assert len(drafted) > len(prompts)
    for ids in drafted:
        heads = _our_logprobs(model, ids, depths)[1:]
        best = heads[:, 0, ids.size(1) - depths - 2].argmax(-1)
        assert ids[0, -depths:].tolist() == best.tolist()


def _record_drafts(monkeypatch):
    """List that fills with the ids [1, s] of which the last are drafted."""
    propose, found = MTPCandidateGenerator.get_candidates, []

    def recorded(*args, **kwargs):
        ids, logits = propose(*args, **kwargs)
        if logits is not None:
            found.append(ids)
        return ids, logits

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", recorded)
    return found


def _our_logprobs(model, ids, depths):
    """Log-probs of every token at every position of each head, [1+K, b, s, v]."""
    given, found = head_targets(ids, depths), []
    for depth in range(1 + depths):
        # depth k reads the targets of the depths before it; its own is the token asked for
        targets = given[: 1 + depth].repeat(1, VOCABULARY, 1)
        targets[depth] = torch.arange(VOCABULARY).repeat_interleave(len(ids)).unsqueeze(1)
        rows = ids.repeat(VOCABULARY, 1)
        # the MTP block runs whole
        missing = targets[:1].expand(model.config.mtp_num_layers - depth, -1, -1)
        request = HeadRequest(torch.cat((targets, missing)))
        outputs = model(rows, positions(rows), None, request=request)
        logprobs = torch.stack((outputs.logprobs, *outputs.passes[0]))[depth]
        found.append(logprobs.view(VOCABULARY, len(ids), -1).permute(1, 2, 0))
    return torch.stack(found)
