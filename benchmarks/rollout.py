"""Rollouts by the embedded engine and by transformers ``generate``: the same weights and prompts.

Three tables, each measured in one run with all sides taking turns; medians, and the medians of
ratios to plain ``generate`` with its KV cache in the same round.

1. Even: responses of the demo's task, which all have about the same length.
2. Uneven: of every 64 responses one is long and 63 are short, and as many have to be made as fill
   64 places several times. Lengths are imposed, stop tokens are off. ``generate`` gets a stopping
   criterion for each row; its batch runs until the last row is done. The last column is the
   engine's own rate with even lengths of the same mean.
3. What drafts cost: time of a cycle without drafts and of one with k, which is also the number of
   tokens that a sequence must get of a cycle to break even, and what it gets on the demo's model.
   The same for a trunk of twelve layers, against which the one MTP layer weighs less.

transformers reads its MTP layers from disk for each call; that is left out of its time.

    python -m benchmarks.rollout [--run RUN] [--rounds 5] [--threads 1] [--only even]
        [--json FILE]

``--run`` is a folder of ``megatron-occ demo`` or ``pretrain``; without it one is pretrained first.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_model import DemoModel, demo_model, demo_model_of
from benchmarks.peer_generate import PeerSampling, generate
from benchmarks.peer_weights import export_peer, load_peer
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import shutdown
from megatron_occ.rollout import Request, SamplingSettings

BATCHES = {1: 12, 16: 128, 64: 512}
PLAIN, DEEP = "transformers", 12
SHORT, LONG, PLACES, GROUPS = 16, 128, 64, 40
SPECULATIONS = {
    "plain": Speculation(),
    "1 draft": Speculation(1),
    "2 drafts": Speculation(2),
    "auto": Speculation(3, adaptive=True),
}
Rates = dict[str, list[float]]


@dataclass(frozen=True)
class Peers:
    """Copies of the weights for plain generation and for that with MTP, whose hooks stay."""

    plain: Any
    mtp: Any


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("even", "uneven", "costs"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    demo = demo_model(options.run, ["model.max_position_embeddings=512"])
    with tempfile.TemporaryDirectory() as folder:
        plain = export_peer(
            demo.actor.chunks[0],
            demo.config,
            Path(folder),
            stop_ids=demo.stop_ids,
            pad_id=demo.tokenizer.pad_id,
        )
        peers = Peers(plain, load_peer(Path(folder)))
        results = {
            name: table(demo, peers, options.rounds)
            for name, table in (("even", even), ("uneven", uneven), ("costs", costs))
            if options.only in (None, name)
        }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    shutdown()


def engine(demo: DemoModel, slots: int, speculation: Speculation) -> MegatronEngine:
    """On the demo's weights."""
    return MegatronEngine(
        demo.actor.inference_chunks, demo.actor.layout, slots=slots, speculation=speculation
    )


def even(demo: DemoModel, peers: Peers, rounds: int) -> dict[str, Any]:
    """Table 1."""
    sampling = SamplingSettings(1.0, 20, demo.stop_ids)
    theirs = PeerSampling(20, demo.stop_ids, demo.tokenizer.pad_id)
    print("\n1. Even lengths, temperature 1: tokens a second (and times plain transformers)")
    found = {}
    for batch, count in BATCHES.items():
        prompts, mtp = demo.prompts(count), replace(theirs, use_mtp=True)
        sides: dict[str, Callable[[int], float]] = {
            PLAIN: lambda seed, p=prompts, b=batch: rate_of_peer(peers.plain, p, theirs, b),
        }
        if batch == 1:
            sides["use_mtp=True"] = lambda seed, p=prompts, m=mtp: rate_of_peer(peers.mtp, p, m, 1)
        lengths: dict[str, float] = {}
        for name, speculation in SPECULATIONS.items():
            own = engine(demo, batch, speculation)
            sides[f"ours, {name}"] = functools.partial(
                rate_of_engine, own, prompts, sampling, acceptance=lengths, name=name
            )
        rates = measure(sides, rounds)
        found[batch] = {"rates": rates, "acceptance_length": lengths}
        print_rates(f"batch {batch}", rates)
    drafted = {name: round(value, 2) for name, value in lengths.items()}
    print(f"   acceptance length at batch {batch}: {drafted}")
    return found


def uneven(demo: DemoModel, peers: Peers, rounds: int) -> dict[str, Any]:
    """Table 2."""
    lengths = ([SHORT] * 31 + [LONG] + [SHORT] * 32) * GROUPS
    mean = sum(lengths) / len(lengths)
    prompts, settings = demo.prompts(len(lengths)), SamplingSettings(1.0, LONG)
    own = {name: engine(demo, PLACES, s) for name, s in SPECULATIONS.items()}
    sides: dict[str, Callable[[int], float]] = {
        PLAIN: lambda seed: rate_of_peer(
            peers.plain,
            prompts,
            PeerSampling(LONG, (), demo.tokenizer.pad_id),
            PLACES,
            lengths=lengths,
        )
    }
    for name, each in own.items():
        sides[f"ours, {name}"] = lambda seed, e=each: rate_of_engine(
            e, prompts, settings, seed, limits=lengths
        )
    plain = own["plain"]
    sides["ours, plain, even lengths"] = lambda seed: rate_of_engine(
        plain, prompts, settings, seed, limits=[round(mean)] * len(lengths)
    )
    print(
        f"\n2. Uneven lengths, 64 places: {SHORT} tokens, every 64th {LONG}, "
        f"{len(lengths)} responses"
    )
    rates = measure(sides, rounds)
    print_rates("uneven", rates)
    pairs = zip(rates["ours, plain"], rates["ours, plain, even lengths"], strict=True)
    kept = statistics.median(a / b for a, b in pairs)
    print(f"   uneven / even, ours without drafts: {kept:.2f}")
    return {"rates": rates, "uneven_over_even": kept}


def rate_of_peer(
    peer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: PeerSampling,
    batch: int,
    lengths: Sequence[int] | None = None,
) -> float:
    """Tokens a second of transformers."""
    return generate(peer, prompts, sampling, batch, lengths=lengths).tokens_per_second


def rate_of_engine(
    own: MegatronEngine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    seed: int,
    acceptance: dict[str, float] | None = None,
    name: str = "",
    limits: Sequence[int] | None = None,
) -> float:
    """Tokens a second of the engine."""
    limits = limits or [sampling.max_response_length] * len(prompts)
    requests = [
        Request(prompt, seed * len(prompts) + index, limit)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    start = time.perf_counter()
    found = own.generate(requests, sampling)
    seconds = time.perf_counter() - start
    if acceptance is not None:
        acceptance[name] = found.drafts.acceptance_length
    return sum(map(len, found.tokens)) / seconds


def measure(sides: dict[str, Callable[[int], float]], rounds: int) -> Rates:
    """Rates of all sides, which take turns; the first round is not counted."""
    rates: Rates = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            rate = side(number)
            if number > 0:
                rates[name].append(rate)
    return rates


def print_rates(title: str, rates: Rates) -> None:
    """A line for each side."""
    print(f"   {title}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[PLAIN], strict=True))
        print(f"     {name:<28}{statistics.median(values):>10,.0f}   x {ratio:.2f}")


def costs(demo: DemoModel, _peers: Peers, rounds: int) -> list[dict[str, float]]:
    """Table 3."""
    print("\n3. Milliseconds of a cycle, and the tokens a sequence must get of it to break even")
    print("   layers  places  drafts  cycle ms  break-even  tokens, demo  speed-up")
    deep = demo_model_of(demo, DEEP)
    rows = []
    for places, count in BATCHES.items():
        tokens: list[float] = []
        for layers, model in ((demo.config.model.num_layers, demo), (DEEP, deep)):
            cycles = [Cycles(engine(model, places, Speculation(k))) for k in range(4)]
            for number in range(rounds + 1):
                for each in cycles:
                    each.run(model.prompts(count), model.stop_ids, number)
            # the deep model's weights are random: its passes cost what they cost, and its drafts
            # are taken to be accepted as often as the demo's
            tokens = tokens or [each.tokens for each in cycles]
            plain = cycles[0].milliseconds(places)
            for drafts, each in enumerate(cycles):
                cycle = each.milliseconds(places)
                gain = tokens[drafts] * plain / cycle
                rows.append(
                    dict(
                        layers=layers,
                        places=places,
                        drafts=drafts,
                        milliseconds=cycle,
                        break_even=cycle / plain,
                        tokens=tokens[drafts],
                        speed_up=gain,
                    )
                )
                print(
                    f"   {layers:>6}  {places:>6}  {drafts:>6}  {cycle:>8.2f}  "
                    f"{cycle / plain:>10.2f}  {tokens[drafts]:>12.2f}  {gain:>8.2f}"
                )
    return rows


class Cycles:
    """Times of an engine's cycles with all places taken, by way of what its controller is told."""

    def __init__(self, own: MegatronEngine) -> None:
        self.engine, self.seconds, self.tokens = own, {}, 1.0
        observe = own.draft_length.observe

        def spy(sequences: int, length: int, seconds: float, drafts: Any) -> None:
            self.seconds.setdefault(sequences, []).append(seconds)
            observe(sequences, length, seconds, drafts)

        own.draft_length.observe = spy

    def run(self, prompts: Sequence[Sequence[int]], stop: tuple[int, ...], seed: int) -> None:
        """Generate once."""
        sampling = SamplingSettings(1.0, 20, stop)
        requests = [Request(prompt, seed * 1000 + i) for i, prompt in enumerate(prompts)]
        self.tokens = self.engine.generate(requests, sampling).drafts.acceptance_length

    def milliseconds(self, sequences: int) -> float:
        """Median of the cycles of so many sequences."""
        return 1000 * statistics.median(self.seconds[sequences])


if __name__ == "__main__":
    main()
