"""Generation under every kind of layout, with drafts: what one process gives without them.

With the rule ``rejection`` what one process gives with the same drafts: the tokens hang on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state

from benchmarks.layout_cases import (
    BEFORE,
    CP2,
    DENSE,
    MLA,
    MOE,
    PP2,
    SEQUENCE,
    TP2,
    UNTIED,
    read,
)
from benchmarks.layout_runs import VOCABULARY, routed_layers
from megatron_occ.config import Config, validate
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_model, model_state
from megatron_occ.mcore.inference import room, sampler
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation, speculation_from
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.rl.batch import pad_masks
from megatron_occ.rollout import Generation, Request, SamplingSettings
from tests.mcore.distributed import run_ranks
from tests.mcore.test_speculation import scale_final_norm

LENGTHS = (5, 1, 9, 3, 5, 7, 2)
TEMPERATURE = 0.8
SAMPLING = SamplingSettings(TEMPERATURE, 8, stop_ids=(0, 1, 2))
CUT = replace(SAMPLING, top_p=0.8, top_k=9, keep_masks=True)
ONE_DEPTH, TWO_DEPTHS = ("mtp.num_layers=1",), ("mtp.num_layers=2",)
FIXED = "rl.rollout.speculative.mode=fixed"
REJECTION = ("rl.rollout.speculative.acceptance=rejection", FIXED)
MODELS = {
    "dense": DENSE + TWO_DEPTHS,
    "untied": DENSE + UNTIED + TWO_DEPTHS,
    "moe": MOE + ONE_DEPTH,
    "mla": MLA + ONE_DEPTH,
    "before the norm": DENSE + UNTIED + TWO_DEPTHS + BEFORE,
    "rejection": DENSE + TWO_DEPTHS + REJECTION,
    "moe, rejection": MOE + ONE_DEPTH + REJECTION,
}
EP2 = "parallel.expert=2"
VPP2 = "parallel.virtual_pipeline=2"
CASES = {
    "TP2": ("dense", (TP2,)),
    "TP2 + SP": ("untied", (TP2, *SEQUENCE)),
    "TP2 + SP, full recompute": ("dense", (TP2, *SEQUENCE, "recompute=full")),
    "PP2": ("dense", (PP2,)),
    "PP2, untied": ("untied", (PP2,)),
    "PP2 x VPP2": ("dense", (PP2, VPP2)),
    "PP2, the end of the trunk on an earlier stage": (
        "dense",
        (PP2, VPP2, "parallel.pipeline_layout=Ett|tt||mmL"),
    ),
    "PP2 x VPP2, no trunk layer on the last stage, untied": (
        "untied",
        (PP2, VPP2, "parallel.pipeline_layout=Ett|t|t|mmL"),
    ),
    "TP2, before the norm": ("before the norm", (TP2,)),
    "PP2 x VPP2, before the norm, the end of the trunk on an earlier stage": (
        "before the norm",
        (PP2, VPP2, "parallel.pipeline_layout=Ett|tt||mmL"),
    ),
    "CP2": ("dense", (CP2,)),
    "DP2": ("dense", ()),
    "MoE, EP2": ("moe", (EP2,)),
    "MoE, PP2": ("moe", (PP2,)),
    "MoE, CP2": ("moe", (CP2,)),
    "MoE, TP2 + SP": ("moe", (TP2, *SEQUENCE)),
    "MLA, TP2": ("mla", (TP2,)),
    "MLA, CP2": ("mla", (CP2,)),
    "MLA, PP2": ("mla", (PP2,)),
    "TP2, rejection": ("rejection", (TP2,)),
    "PP2, rejection": ("rejection", (PP2,)),
    "CP2, rejection": ("rejection", (CP2,)),
    "MoE, EP2, rejection": ("moe, rejection", (EP2,)),
}
THREE_RANKS = {
    "PP3, MTP and output layers on a stage without trunk layers": (
        "dense",
        ("parallel.pipeline=3", "parallel.pipeline_layout=Ett|tt|mmL"),
    ),
    "PP3, before the norm, MTP stage of its own": (
        "before the norm",
        ("parallel.pipeline=3", "parallel.pipeline_layout=Etttt|mm|L"),
    ),
    "PP3, MTP stage of its own": (
        "untied",
        ("parallel.pipeline=3", "parallel.pipeline_layout=Etttt|mm|L"),
    ),
}
NAMES = (*CASES, *THREE_RANKS)
# of the prompts: an odd number, and fewer than there are ranks
COUNTS = (len(LENGTHS), 1)


@dataclass
class Responses:
    """What was generated for which prompts; log-probs by training forwards, padded and packed.

    ``cut``: under cuts whose masks are kept, and ``cut_training`` log-probs with these and without.
    Its experts are kept where there are any, of the ``layers`` of this rank.
    """

    numbers: list[int]
    found: Generation
    training: list[list[list[float]]]
    cut: Generation
    cut_training: list[list[list[float]]]
    layers: list[int]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS
    ]


def make_actor(config: Config) -> MegatronGPTActor:
    layout = initialize(config)
    return MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=1
    )


def respond(actor: MegatronGPTActor, numbers: list[int], speculation: Speculation) -> Responses:
    """To the prompts of these numbers; empty lists take part in what ranks do together."""
    chosen = [prompts()[number] for number in numbers]
    engine = MegatronEngine(actor.inference_chunks, actor.layout, slots=3, speculation=speculation)
    requests = [Request(prompts()[number], 100 + number) for number in numbers]
    found = engine.generate(requests, SAMPLING)
    training = [training_logprobs(actor, chosen, found, packed) for packed in (False, True)]
    has_experts = actor.config.model.moe.num_experts is not None
    if torch.distributed.get_world_size() > 1 and speculation.coupled:
        # too few for three rows at their ends
        engine.cache_tokens = 24
    with mock.patch.object(room, "OTHER_PAGE", 4):
        cut = engine.generate(requests, replace(CUT, keep_routes=has_experts))
    free = replace(cut, masks=[])
    both = [training_logprobs(actor, chosen, each, True) for each in (cut, free)]
    layers = routed_layers(actor) if has_experts else []
    return Responses(numbers, found, training, cut, both, layers)


def training_logprobs(actor, chosen, found: Generation, packed: bool) -> list[list[float]]:
    """As many rows on every rank and as wide: ranks that share experts go in step."""
    width = max(LENGTHS) + SAMPLING.max_response_length
    ids = torch.zeros(8, width, dtype=torch.long)
    for row, (prompt, tokens) in enumerate(zip(chosen, found.tokens, strict=True)):
        ids[row, : len(prompt) + len(tokens)] = torch.tensor(prompt + tokens)
    lengths = [len(p) + len(tokens) for p, tokens in zip(chosen, found.tokens, strict=True)]
    lengths += [1] * (8 - len(lengths))
    parts = [[0, 1], [2, 3], [4, 5], [6, 7]]
    masks = None
    if found.masks:
        empty = [torch.zeros(1, 1, dtype=torch.int32)] * (8 - len(chosen))
        padded = pad_masks([*chosen, *[[0]] * len(empty)], [*found.masks, *empty], (width, 9))
        masks = torch.nn.functional.pad(padded[:, 1:], (0, 0, 0, 1))
    logprobs = actor.get_inference_log_probs(
        ids,
        parts=parts,
        lengths=lengths if packed else None,
        temperature=TEMPERATURE,
        masks=masks,
    )
    spans = zip(logprobs, chosen, found.tokens, strict=False)
    return [
        row[len(prompt) - 1 : len(prompt) - 1 + len(tokens)].tolist()
        for row, prompt, tokens in spans
    ]


def run_cases(folder: Path, cases: list[tuple[str, tuple[str, ...]]]) -> list[list[Responses]]:
    """[case][count] on this rank."""
    results = []
    for model, layout in cases:
        # no drafts can be made where the output layer is alone, and "fixed" is refused
        drafting = () if "|L" in "".join(layout) else (FIXED,)
        config = read(MODELS[model], (*layout, *drafting))
        validate(config, command="rl", world_size=torch.distributed.get_world_size())
        actor = make_actor(config)
        load_model(actor, dist_checkpointing.load(model_state(actor), str(folder / model)))
        rank, size = actor.layout.data_parallel_rank, actor.layout.data_parallel_size
        mine = [list(range(count))[rank::size] for count in COUNTS]
        drafts = speculation_from(config)
        results.append([respond(actor, numbers, drafts) for numbers in mine])
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Responses of one process to all prompts, by model, and the folder of the weights."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for name, model in MODELS.items():
        config = read(model)
        actor = make_actor(config)
        scale_final_norm(actor.chunks[0])
        drafts = speculation_from(config) if FIXED in model else Speculation()
        found[name] = respond(actor, list(range(len(LENGTHS))), drafts)
        (folder / name).mkdir()
        dist_checkpointing.save(model_state(actor), str(folder / name))
        shutdown()
    return found, folder


@pytest.fixture(scope="module")
def split(alone):
    """Responses by case, [count][rank]."""
    found = {}
    for size, chosen in ((2, CASES), (3, THREE_RANKS)):
        by_rank = run_ranks(run_cases, size, alone[1], list(chosen.values()), timeout=300)
        for name, ranks in zip(chosen, zip(*by_rank, strict=True), strict=True):
            found[name] = list(zip(*ranks, strict=True))
    return found


def test_the_responses_of_one_process_are_worth_comparing(alone):
    assert alone[0]["rejection"].found.tokens != alone[0]["dense"].found.tokens
    assert sum(alone[0]["rejection"].found.drafts.accepted) > 0
    for responses in alone[0].values():
        assert len(set(map(len, responses.found.tokens))) > 1
        assert set(responses.found.finish_reasons) == {"stop", "length"}
        for training in responses.training:
            assert_same_logprobs(responses.found.logprobs, training)


@pytest.mark.parametrize("name", NAMES)
def test_responses_are_those_of_one_process(alone, split, name):
    expected = alone[0][{**CASES, **THREE_RANKS}[name][0]].found
    for count, ranks in zip(COUNTS, split[name], strict=True):
        answered = set()
        for responses in ranks:
            for place, number in enumerate(responses.numbers):
                assert responses.found.tokens[place] == expected.tokens[number]
                assert responses.found.finish_reasons[place] == expected.finish_reasons[number]
            logprobs = [expected.logprobs[number] for number in responses.numbers]
            assert_same_logprobs(responses.found.logprobs, logprobs)
            answered |= set(responses.numbers)
        assert answered == set(range(count))


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_are_those_of_the_training_forward(split, name):
    for ranks in split[name]:
        for responses in ranks:
            for training in responses.training:
                assert_same_logprobs(responses.found.logprobs, training)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_come_with_what_they_were_drawn_from(alone, split, name):
    expected = alone[0][{**CASES, **THREE_RANKS}[name][0]].cut
    for ranks in split[name]:
        for responses in ranks:
            cut = responses.cut
            assert_same_logprobs(cut.logprobs, responses.cut_training[0])
            for place, number in enumerate(responses.numbers):
                assert cut.tokens[place] == expected.tokens[number]
                assert torch.equal(cut.masks[place], expected.masks[number])


# in whole rows, and without drafts, for which there is room
UNPRESSED = ("rejection", "MTP stage of its own")


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(UNPRESSED)])
def test_they_do_where_sequences_give_way_to_others(split, name):
    many, one = split[name]
    # ranks with few sequences have room for all of them
    gave_way = [responses.cut.drafts.preempted for responses in many]
    assert all(times > 0 or len(r.numbers) < 5 for times, r in zip(gave_way, many, strict=True))
    assert not any(responses.cut.drafts.preempted for responses in one)


@pytest.mark.parametrize("name", [name for name in NAMES if "MoE" in name])
def test_tokens_come_with_the_experts_that_they_went_to(alone, split, name):
    single, drafted = alone[0][CASES[name][0]], 0
    for ranks in split[name]:
        for responses in ranks:
            for place, number in enumerate(responses.numbers):
                expected = single.cut.routes[number].long().sort(-1).values
                found = responses.cut.routes[place].long().sort(-1).values
                for column, layer in enumerate(responses.layers):
                    # the first layer has no experts
                    own, other = found[:, column], expected[:, layer - 1]
                    # MTP layers: what one process did not draft it has not read
                    both = (own > 0).all(1) & (other > 0).all(1)
                    assert torch.equal(own[both], other[both])
                    if layer < 4:
                        assert both.all()
                    drafted += int((own > 0).sum()) if layer == 4 else 0
    assert drafted > 0


def test_masks_hold_the_tokens_that_were_drawn_and_differ(alone):
    for responses in alone[0].values():
        with_masks, without = responses.cut_training
        assert_same_logprobs(responses.cut.logprobs, with_masks)
        # pi / mu is the mass that the cuts left
        pairs = zip(without, with_masks, strict=True)
        gaps = [torch.tensor(a) - torch.tensor(b) for a, b in pairs]
        ratios = torch.cat(gaps).exp()
        assert ratios.max() < 1 + 1e-5
        assert ratios.mean() < 0.95
        sizes = set()
        for tokens, mask in zip(responses.cut.tokens, responses.cut.masks, strict=True):
            assert ((mask - 1) == torch.tensor(tokens).unsqueeze(1)).any(1).all()
            sizes |= set((mask > 0).sum(1).tolist())
        assert len(sizes) > 2
        assert max(sizes) <= CUT.top_k


def aborted_on_each_rank() -> list[list[list[str]]]:
    """For each rank, finish reasons of a call that is aborted there, and of the next one."""
    actor = make_actor(read(MODELS["dense"], (TP2, PP2)))
    engine = MegatronEngine(actor.inference_chunks, actor.layout, slots=3)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts())]
    found = []
    for rank in range(actor.layout.world_size):
        if actor.layout.rank == rank:
            engine.abort()
        found.append([engine.generate(requests, SAMPLING).finish_reasons for _ in range(2)])
    return found


def test_an_abort_on_any_rank_ends_the_call_on_all_that_share_the_model():
    for found in run_ranks(aborted_on_each_rank, 4):
        for aborted, whole in found:
            assert aborted == ["abort"] * len(LENGTHS)
            assert "abort" not in whole


def with_second_looks() -> list[list[list[int]]]:
    """Tokens under top-p where all rows need one look, and where some need two."""
    actor = make_actor(read(MODELS["dense"], (TP2, PP2)))
    engine = MegatronEngine(actor.inference_chunks, actor.layout, slots=3)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts())]
    settings = replace(SAMPLING, top_p=0.6)
    one = engine.generate(requests, settings).tokens
    with mock.patch.object(sampler, "LIKELIEST", 3):
        return [one, engine.generate(requests, settings).tokens]


def test_a_second_look_is_one_of_all_stages():
    for one, two in run_ranks(with_second_looks, 4):
        assert one == two


def assert_same_logprobs(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
