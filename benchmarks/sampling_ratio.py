"""Ratio of the trained policy to the one that sampled, before any update, with sampling masks and
without: responses of the demo's model under top-p.

    python -m benchmarks.sampling_ratio [--run RUN] [--top-p 0.9] [--prompts 512]

Prints the ratio's mean, extremes and the share of tokens where it is not 1.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.demo_model import DemoModel, demo_model
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import shutdown
from megatron_occ.rl.batch import RolloutBatch, masks_at_source, pad_masks, pad_sequences
from megatron_occ.rollout import Generation, Request, SamplingSettings

MICRO_BATCH, DRAFTS = 64, 1
# fp32 log-probs of two kinds of forward pass differ by rounding
ONE = 1e-4


def main() -> None:
    """Sample, score twice, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--prompts", type=int, default=512)
    options = parser.parse_args()
    demo = demo_model(options.run)
    prompts = demo.prompts(options.prompts)
    found = sample(demo, prompts, options.top_p)
    print(f"{sum(map(len, found.tokens))} tokens under top-p {options.top_p}")
    print("| | mean | least | most | not 1 |\n|---|---|---|---|---|")
    batch = padded(demo, prompts, found)
    for name, masks in (("with masks", masks_at_source(batch)), ("without", None)):
        ratio = ratios(demo, batch, masks)
        off = ((ratio - 1).abs() > ONE).double().mean()
        values = f"{ratio.mean():.6f} | {ratio.min():.6f} | {ratio.max():.6f}"
        print(f"| {name} | {values} | {100 * off:.1f} % |")
    shutdown()


def sample(demo: DemoModel, prompts: list[list[int]], top_p: float) -> Generation:
    """A response each, and the tokens that each of its tokens was drawn from."""
    rollout = demo.config.rl.rollout
    settings = SamplingSettings(
        rollout.temperature,
        rollout.max_response_length,
        stop_ids=demo.stop_ids,
        top_p=top_p,
        top_k=demo.tokenizer.vocab_size,
        keep_masks=True,
    )
    engine = MegatronEngine(
        demo.actor.inference_chunks,
        demo.actor.layout,
        slots=rollout.batch_size,
        speculation=Speculation(DRAFTS),
    )
    return engine.generate([Request(tokens, seed) for seed, tokens in enumerate(prompts)], settings)


def padded(demo: DemoModel, prompts: list[list[int]], found: Generation) -> RolloutBatch:
    """The responses as a batch, with their masks."""
    width = max(len(p) + len(t) for p, t in zip(prompts, found.tokens, strict=True))
    batch = pad_sequences(
        prompts,
        found.tokens,
        found.logprobs,
        torch.zeros(len(prompts)),
        demo.tokenizer.pad_id,
        width,
        demo.actor.layout.device,
    )
    widest = max(mask.size(-1) for mask in found.masks)
    return replace(batch, sampling_masks=pad_masks(prompts, found.masks, (width, widest)))


def ratios(demo: DemoModel, batch: RolloutBatch, masks: Tensor | None) -> Tensor:
    """exp(training - rollout log-prob) of all response tokens; masks in the source frame."""
    rows = range(len(batch.ids))
    training = demo.actor.get_inference_log_probs(
        batch.ids,
        parts=[rows[first : first + MICRO_BATCH] for first in rows[::MICRO_BATCH]],
        lengths=None,
        temperature=demo.config.rl.rollout.temperature,
        masks=masks,
    )
    gaps = training[:, :-1].double() - batch.rollout_logprobs[:, 1:].double()
    return gaps[batch.response_mask[:, 1:] > 0].exp()


if __name__ == "__main__":
    main()
