"""Speculative decoding changes nothing: greedy token by token, sampling by a test of distribution.

Greedy: responses with drafts against responses without, for 1,000 prompts.

Sampling: every token of at least 200,000 is compared with its exact distribution given what came
before it, computed by transformers on the same weights. Tokens are counted by their rank under that
distribution (the likeliest is rank 1); given the prefixes, counts have mean sum(p) and covariance
sum(diag(p) - p p'), so that the squared distance is chi-square (a sum of martingale differences).
The same test must reject a rule that is wrong: one that draws from the target itself, in place of
what the draft left of it, after a rejection.

Acceptance: both rules on random distributions, by size of the vocabulary.

    python -m benchmarks.lossless [--run RUN] [--prompts 1000] [--tokens 200000] [--seed 0]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.demo_model import DemoModel, demo_model
from benchmarks.peer_weights import export_peer
from megatron_occ.mcore.inference import sampler
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import shutdown
from megatron_occ.rollout import (
    Request,
    SamplingSettings,
    row_keys,
    sample_by_race,
    sample_from_uniform,
    speculative_accept,
    token_keys,
)
from megatron_occ.rollout.sampling import cut_log_probs, token_log_probs

SETTINGS = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
}
SLOTS, RANKS, DRAFTS = 256, 6, 2
VOCABULARIES, PARTS = (20, 1_000, 50_000, 150_000), 12


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    demo = demo_model(options.run)
    results = {"greedy": greedy(demo, options.prompts)}
    with tempfile.TemporaryDirectory() as folder:
        peer = export_peer(demo.actor.chunks[0], demo.config, Path(folder))
        results["sampling"] = sampling(demo, peer, options.tokens, options.seed)
    results["acceptance"] = acceptance(options.seed)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    shutdown()


def respond(
    demo: DemoModel,
    prompts: Sequence[Sequence[int]],
    speculation: Speculation,
    seed: int = 0,
    **cuts: Any,
) -> Any:
    """Responses to prompts, each with random numbers of its own."""
    engine = MegatronEngine(
        demo.actor.inference_chunks, demo.actor.layout, slots=SLOTS, speculation=speculation
    )
    requests = [Request(prompt, seed * 10**6 + i) for i, prompt in enumerate(prompts)]
    return engine.generate(requests, SamplingSettings(**cuts))


def greedy(demo: DemoModel, count: int) -> dict[str, int]:
    """Number of prompts whose response is the same with drafts."""
    settings = dict(temperature=0, max_response_length=20, stop_ids=demo.stop_ids)
    prompts = demo.prompts(count)
    plain = respond(demo, prompts, Speculation(), **settings)
    found = {}
    print(f"greedy, {count} prompts: equal responses, and tokens a trunk pass")
    for drafts in (1, 2, 3):
        drafted = respond(demo, prompts, Speculation(drafts), **settings)
        pairs = zip(plain.tokens, drafted.tokens, strict=True)
        found[drafts] = sum(one == other for one, other in pairs)
        length = drafted.drafts.acceptance_length
        print(f"  {drafts} drafts  {found[drafts]:>6} of {count}   {length:.2f}")
    return found


def sampling(demo: DemoModel, peer: Any, tokens: int, seed: int) -> list[dict[str, Any]]:
    """p-values of the rules, and of a wrong one."""
    prompts = demo.prompts(256)
    prompts = (prompts * (tokens // (16 * len(prompts)) + 1))[: tokens // 16 + 1]
    rows = []
    print(f"sampling, {DRAFTS} drafts\n  {'':<28}{'rule':<22}{'tokens':>9}{'chi2':>10}{'p':>11}")
    for name, cuts in SETTINGS.items():
        settings = dict(max_response_length=20, stop_ids=demo.stop_ids, **cuts)
        for rule in ("plain", "coupled", "rejection", "wrong on purpose"):
            speculation = Speculation(DRAFTS, coupled=rule == "coupled")
            if rule == "plain":
                speculation = Speculation()
            accept = wrong_rule if rule.startswith("wrong") else speculative_accept
            with mock.patch.object(sampler, "speculative_accept", accept):
                found = respond(demo, prompts, speculation, seed=seed, **settings)
            distance, probability, count = distance_to_exact(
                peer, prompts, found.tokens, SamplingSettings(**settings)
            )
            rows.append(dict(setting=name, rule=rule, tokens=count, chi2=distance, p=probability))
            print(f"  {name:<28}{rule:<22}{count:>9}{distance:>10.1f}{probability:>11.2g}")
    return rows


def acceptance(seed: int) -> list[dict[str, float]]:
    """Share of drafts that each rule accepts, by size of the vocabulary.

    Logits are normal with deviation 5, the draft's are off by 0.3; rejection accepts 1 - TV.
    """
    rows = []
    print("accepted drafts by vocabulary\n  ids       coupled  rejection")
    for ids in VOCABULARIES:
        parts = [accepted_shares(ids, seed + part) for part in range(PARTS)]
        coupled, rejection = torch.tensor(parts).mean(0).tolist()
        rows.append(dict(ids=ids, coupled=coupled, rejection=rejection))
        print(f"  {ids:<8}{coupled:>9.3f}{rejection:>11.3f}")
    return rows


def accepted_shares(ids: int, seed: int, pairs: int = 250) -> tuple[float, float]:
    """Of some random pairs of distributions, by the coupled rule and by rejection."""
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(pairs, ids, generator=generator)
    noise = 0.3 * torch.randn(pairs, ids, generator=generator)
    target, draft = logits.log_softmax(-1), (logits + noise).log_softmax(-1)
    keys = token_keys(row_keys([seed]), torch.arange(pairs))[0]
    same = sample_by_race(draft, keys) == sample_by_race(target, keys)
    overlap = torch.minimum(draft, target).exp().sum(-1)
    return same.double().mean().item(), overlap.mean().item()


def wrong_rule(
    draft_tokens: Tensor,
    draft_logprobs: Tensor,
    target_logprobs: Tensor,
    *,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """Forgets to take away what the draft had already been given."""
    accepted, _ = speculative_accept(draft_tokens, draft_logprobs, target_logprobs, uniform=uniform)
    rows = torch.arange(len(accepted))
    return accepted, sample_from_uniform(
        target_logprobs[rows, accepted], uniform[rows, accepted, 1]
    )


@torch.no_grad()
def distance_to_exact(
    peer: Any,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    settings: SamplingSettings,
) -> tuple[float, float, int]:
    """Chi-square of the ranks of all tokens, its p-value, and the number of tokens."""
    excess = torch.zeros(RANKS, dtype=torch.float64)
    covariance = torch.zeros(RANKS, RANKS, dtype=torch.float64)
    count = 0
    for start in range(0, len(prompts), 512):
        part = list(zip(prompts, responses, strict=True))[start : start + 512]
        width = max(len(prompt) + len(response) for prompt, response in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        inside = torch.zeros(len(part), width - 1, dtype=torch.bool)
        for row, (prompt, response) in enumerate(part):
            ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
            inside[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
        log_probs = token_log_probs(peer(ids).logits[:, :-1][inside], settings.temperature)
        exact, order = cut_log_probs(log_probs, settings).double().exp().sort(-1, descending=True)
        drawn = (order == ids[:, 1:][inside].unsqueeze(1)).long().argmax(1)
        # ranks behind the last category are one category
        by_rank = torch.cat((exact[:, : RANKS - 1], exact[:, RANKS - 1 :].sum(1, True)), dim=1)
        counted = torch.nn.functional.one_hot(drawn.clamp(max=RANKS - 1), RANKS).double()
        excess += (counted - by_rank).sum(0)
        covariance += torch.diag(by_rank.sum(0)) - by_rank.t() @ by_rank
        count += len(drawn)
    # categories without any mass have no variance
    used = covariance.diagonal() > 1e-9
    left, right = excess[used], covariance[used][:, used]
    distance = float(left @ torch.linalg.pinv(right, hermitian=True) @ left)
    freedom = torch.tensor(int(used.sum()) - 1, dtype=torch.float64)
    survival = torch.special.gammaincc(freedom / 2, torch.tensor(distance / 2).double())
    return distance, float(survival), count


if __name__ == "__main__":
    main()
