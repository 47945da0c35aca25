"""The embedded engine against full forward passes of the same model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import YarnConfig
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.provider import build_inference_chunk
from megatron_occ.rl.batch import head_targets
from megatron_occ.rollout import EngineError, Request, SamplingSettings
from tests.mcore.conftest import (
    VOCABULARY,
    build_model,
    gradients,
    positions,
    random_ids,
    small_config,
)

LENGTHS = (5, 1, 9, 3, 5, 7)
LIMIT = 10
PLAIN = Speculation()
SAMPLING = SamplingSettings(1.0, LIMIT, stop_ids=(0, 1, 2))


@pytest.fixture
def model(layout):
    return build_model(small_config(depths=2), VOCABULARY, layout.device)


def prompts():
    """Uneven lengths, two the same."""
    return [random_ids(1, length, seed=i)[0].tolist() for i, length in enumerate(LENGTHS)]


def make_engine(model, *, slots, speculation=PLAIN, cache_tokens=None):
    config = Config()
    config.model.tie_embeddings = model.share_embeddings_and_output_weights
    config.model.rotary_percent = model.rotary_percent
    copy = build_inference_chunk(model, config)
    return MegatronEngine(
        lambda: [copy.refresh()],
        Layout.of_this_rank(torch.device("cpu")),
        slots=slots,
        cache_tokens=cache_tokens,
        speculation=speculation,
        decode=lambda ids: "".join(chr(ord("a") + i) for i in ids),
    )


def settings(**changes):
    return replace(SAMPLING, **changes)


def requests(prompts, seeds=None, limits=None):
    seeds = [100 + i for i in range(len(prompts))] if seeds is None else seeds
    limits = [None] * len(prompts) if limits is None else limits
    return [Request(*each) for each in zip(prompts, seeds, limits, strict=True)]


def respond(model, prompts, seeds=None, *, slots=None, speculation=PLAIN, **changes):
    engine = make_engine(model, slots=slots or len(prompts), speculation=speculation)
    return engine.generate(requests(prompts, seeds), settings(**changes))


def training_logprobs(model, ids, targets, temperature=1.0):
    with torch.no_grad():
        request = HeadRequest(targets, temperature=temperature)
        return model(ids, positions(ids), None, request=request).logprobs


def greedy_by_full_passes(model, prompt, length):
    """The most likely token, found by asking for the log-prob of each id in the vocabulary."""
    ids, candidates = list(prompt), torch.arange(VOCABULARY).unsqueeze(1)
    for _ in range(length):
        rows = torch.tensor(ids).expand(VOCABULARY, -1)
        targets = candidates.expand_as(rows).unsqueeze(0)
        scores = training_logprobs(model, rows, targets)[:, -1]
        assert abs(float(scores.exp().sum()) - 1) < 1e-5
        ids.append(int(scores.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_the_training_forward(model, temperature):
    result = respond(model, prompts(), temperature=temperature)
    sequences = list(zip(prompts(), result.tokens, strict=True))
    width = max(len(prompt) + len(tokens) for prompt, tokens in sequences)
    ids = torch.full((len(sequences), width), 22)
    for row, (prompt, tokens) in enumerate(sequences):
        ids[row, : len(prompt) + len(tokens)] = torch.tensor(prompt + tokens)
    expected = training_logprobs(model, ids, head_targets(ids, 0), temperature)
    for row, (prompt, tokens) in enumerate(sequences):
        span = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        got = torch.tensor(result.logprobs[row])
        assert got.shape == (len(tokens),)
        torch.testing.assert_close(got, expected[row, span], atol=1e-5, rtol=0)


@pytest.mark.parametrize("slots", [1, 2, 4, 512])
def test_responses_do_not_depend_on_the_number_of_slots(model, slots):
    whole, cut = respond(model, prompts()), respond(model, prompts(), slots=slots)
    assert cut.tokens == whole.tokens
    assert cut.finish_reasons == whole.finish_reasons
    for a, b in zip(cut.logprobs, whole.logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_responses_do_not_depend_on_the_other_prompts(model):
    whole = respond(model, prompts())
    for order in ([4, 2, 0, 5, 1, 3], [3, 2], [1]):
        picked = [prompts()[i] for i in order]
        part = respond(model, picked, seeds=[100 + i for i in order])
        assert part.tokens == [whole.tokens[i] for i in order]
    other = respond(model, prompts(), seeds=[7] * len(LENGTHS))
    assert sum(a != b for a, b in zip(other.tokens, whole.tokens, strict=True)) >= 4


def test_the_same_prompt_with_the_same_seed_has_the_same_response(model):
    prompt = prompts()[0]
    same = respond(model, [prompt] * 3, seeds=[5, 5, 6])
    assert same.tokens[0] == same.tokens[1] != same.tokens[2]


def test_stop_tokens_end_a_response_and_belong_to_it(model):
    endless = respond(model, prompts(), stop_ids=())
    assert [len(tokens) for tokens in endless.tokens] == [LIMIT] * len(LENGTHS)
    assert endless.finish_reasons == ["length"] * len(LENGTHS)
    # the same random numbers: stopping cuts the endless response and changes nothing before
    stop_ids = (endless.tokens[0][3], endless.tokens[1][0], endless.tokens[2][-1])
    result = respond(model, prompts(), stop_ids=stop_ids)
    for row, tokens in enumerate(endless.tokens):
        stops = [i for i, token in enumerate(tokens) if token in stop_ids]
        end = stops[0] + 1 if stops else LIMIT
        assert result.tokens[row] == tokens[:end]
        assert result.logprobs[row] == pytest.approx(endless.logprobs[row][:end], abs=1e-5)
        assert result.finish_reasons[row] == ("stop" if stops else "length")
    assert len(result.tokens[1]) == 1
    assert set(result.finish_reasons) == {"stop", "length"}


def test_a_stop_token_at_the_limit_counts_as_finished(model):
    endless = respond(model, prompts()[:1], stop_ids=())
    last = endless.tokens[0][-1]
    first = endless.tokens[0].index(last)
    result = respond(model, prompts()[:1], stop_ids=(last,), max_response_length=first + 1)
    assert result.tokens == [endless.tokens[0][: first + 1]]
    assert result.finish_reasons == ["stop"]


def test_a_stop_token_in_the_prompt_ends_nothing(model):
    prompt = [0, 1, 2, 0, 5]
    assert respond(model, [prompt]).tokens == respond(model, [prompt, [3]]).tokens[:1]
    assert len(respond(model, [prompt], stop_ids=(), max_response_length=4).tokens[0]) == 4


@pytest.mark.parametrize("limit", [1, 3])
def test_the_limit_is_respected_whatever_the_prompt_lengths(model, limit):
    result = respond(model, prompts(), stop_ids=(), max_response_length=limit)
    assert [len(tokens) for tokens in result.tokens] == [limit] * len(LENGTHS)
    assert [len(values) for values in result.logprobs] == [limit] * len(LENGTHS)
    longer = respond(model, prompts(), stop_ids=())
    assert result.tokens == [tokens[:limit] for tokens in longer.tokens]


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_greedy_decoding_is_that_of_full_passes(model, temperature):
    result = respond(
        model, prompts()[:3], temperature=temperature, stop_ids=(), max_response_length=5
    )
    for prompt, tokens in zip(prompts(), result.tokens, strict=False):
        assert tokens == greedy_by_full_passes(model, prompt, 5)
    certain = sum(map(sum, result.logprobs)) == pytest.approx(0.0, abs=1e-5)
    assert certain == (temperature > 0)


def test_padding_rows_of_the_vocabulary_are_never_drawn(layout):
    """The output layer has one row more than there are ids; it would win every draw."""
    config = small_config(depths=0)
    config.model.tie_embeddings = False
    model = build_model(config, VOCABULARY, layout.device)
    model.valid_vocab_size = VOCABULARY - 1
    with torch.no_grad():
        model.output_layer.weight[-1] = 100 * model.output_layer.weight[3]
    favourite = (VOCABULARY - 1,)
    ids = [[min(i, VOCABULARY - 2) for i in prompt] for prompt in prompts()]
    result = respond(model, ids, stop_ids=favourite)
    assert set(result.finish_reasons) == {"length"}
    assert max(map(max, result.tokens)) < VOCABULARY - 1


@pytest.mark.parametrize("drafts", [PLAIN, Speculation(2), Speculation(2, coupled=False)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_an_error(layout, drafts, temperature):
    """The embedding of one id has diverged: the first request that reads it is named."""
    config = small_config(depths=1)
    config.model.tie_embeddings = False
    model = build_model(config, VOCABULARY, layout.device)
    # never drawn
    stray, model.valid_vocab_size = VOCABULARY - 1, VOCABULARY - 1
    with torch.no_grad():
        model.embedding.word_embeddings.weight[stray] = torch.inf
    prompts, arguments = [[3, 4, 5], [3, 4]], dict(temperature=temperature, speculation=drafts)
    assert len(respond(model, prompts, **arguments).tokens) == 2
    wanted = r"request 2: log-prob of token 0: .*got nan.*lr"
    with pytest.raises(EngineError, match=wanted):
        respond(model, [*prompts, [3, stray], [stray]], **arguments)


@pytest.mark.parametrize("training", [True, False])
def test_the_trained_model_is_not_touched(model, training):
    model.train(training)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if value is not None
    }
    respond(model, prompts())
    assert {module.training for module in model.modules()} == {training}
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_training_after_generation_has_the_gradients_of_before(model):
    ids = random_ids()

    def train():
        model.zero_grad()
        outputs = model(ids, positions(ids), None, request=HeadRequest(head_targets(ids, 2)))
        (outputs.logprobs.sum() + outputs.passes[0].sum()).backward()
        return gradients(model)

    before = train()
    respond(model, prompts(), max_response_length=30)
    after_generation = gradients(model)
    for name, gradient in before.items():
        assert torch.equal(after_generation[name], gradient), name
    after = train()
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


def test_a_scaled_rotary_embedding_is_that_of_the_training_forward(layout):
    config = small_config(depths=1)
    config.model.mla.enabled = True
    config.model.mla.qk_rope_head_dim = 16
    config.model.mla.yarn = YarnConfig(4.0, 8, beta_fast=4.0, beta_slow=0.05)
    scaled = build_model(config, VOCABULARY, layout.device)
    config.model.mla.yarn = YarnConfig()
    plain = build_model(config, VOCABULARY, layout.device)
    plain.load_state_dict(scaled.state_dict())
    found = respond(scaled, prompts(), speculation=Speculation(2))
    gaps = []
    for model in (scaled, plain):
        for prompt, tokens, logprobs in zip(prompts(), found.tokens, found.logprobs, strict=True):
            ids = torch.tensor([prompt + tokens])
            expected = training_logprobs(model, ids, head_targets(ids, 0))
            part = expected[0, len(prompt) - 1 : -1]
            gaps.append((model, (part - torch.tensor(logprobs)).abs().max()))
    assert all(gap < 1e-5 for model, gap in gaps if model is scaled)
    assert any(gap > 1e-2 for model, gap in gaps if model is plain)
