"""Does sampling go on while training does? The client and its servers with known times.

    python -m benchmarks.overlap [--steps 5] [--repeats 3]

The server is simulated (over HTTP, a token every so many milliseconds) and is given the requests of
one step at a time, as one that has no room for more; training is a pause of known length; all
between them is the product: prompts, client, interruption and update of weights, batches. Lags take
turns. The ideal of lag 0 is the sum of both times for each step, that of others the longer one for
each step, besides the first sampling and the last training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_occ.config import load_config
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tasks import Problem
from megatron_occ.data.tokenizers import build_tokenizer
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.rewards import VerifierResult
from megatron_occ.rl.rollouts import RolloutSource
from megatron_occ.rl.sampler import Sampler
from megatron_occ.rollout import SamplingSettings
from megatron_occ.rollout.remote import Probe, RemoteEngine, RemoteSettings
from tests.unit.fake_layouts import FakeLayout
from tests.unit.fake_servers import VOCAB, FakeVllm, export, score

ALPHABET = "abcdefghijklm"
LENGTH = 100
# seconds of sampling and of training in a step
CASES = {"alike": (3.0, 3.0), "training is slower": (1.5, 3.0), "sampling is slower": (3.0, 1.5)}
LAGS = (0, 1, 2)
SIZES = ("rl.prompts_per_step=8", "rl.samples_per_prompt=4")


class Letters:
    """Prompts of two letters."""

    name, alphabet, stop = "letters", ALPHABET, "."

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of a split."""
        prompt = ALPHABET[index % len(ALPHABET)] + ALPHABET[index // len(ALPHABET) % len(ALPHABET)]
        return Problem(prompt, "a", "a", self.name)

    def params(self) -> dict[str, Any]:
        """None."""
        return {}


class Verifiers:
    """Everything is right."""

    def score(self, items: list[Any]) -> list[VerifierResult]:
        """A result for each item."""
        return [VerifierResult(1.0, "ok") for _ in items]


@dataclass
class Policy:
    """What stands for the trained model: its version, and where it is."""

    version: int = 0

    def __post_init__(self) -> None:
        self.layout = FakeLayout()


def main() -> None:
    """Run all cases; print medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| sampling, training | lag | seconds | ideal | ideal / seconds | update, s |")
    print("|---|---|---|---|---|---|")
    for name, times in CASES.items():
        found: dict[int, list[tuple[float, float]]] = {lag: [] for lag in LAGS}
        for _ in range(options.repeats):
            for lag in LAGS:
                found[lag].append(run(lag, options.steps, *times))
        for lag, runs in found.items():
            seconds, update = (statistics.median(column) for column in zip(*runs, strict=True))
            best = ideal(lag, options.steps, *times)
            print(
                f"| {name} | {lag} | {seconds:.2f} | {best:.2f} | {best / seconds:.2f} | "
                f"{update:.3f} |"
            )


def ideal(lag: int, steps: int, sampling: float, training: float) -> float:
    """Seconds of a run in which nothing else takes time."""
    if not lag:
        return steps * (sampling + training)
    return sampling + (steps - 1) * max(sampling, training) + training


def run(lag: int, steps: int, sampling: float, training: float) -> tuple[float, float]:
    """Seconds of a run, and of an update of the weights."""
    config = load_config([], [*SIZES, f"rl.async.max_lag={lag}", f"rl.steps={steps}"])
    server, policy = FakeVllm(pace=0.0), Policy()
    with tempfile.TemporaryDirectory() as folder:
        size = config.rl.prompts_per_step * config.rl.samples_per_prompt
        settings = RemoteSettings(
            *("vllm", (server.url,), Path(folder), VOCAB), concurrency=size, sampling_z=0.0
        )
        probe = Probe([[2, 3, 4]], lambda asked: [score(policy.version, row) for row in asked])
        engine = RemoteEngine(settings, lambda path: export(policy.version, 0)(path), probe)
        tokenizer = build_tokenizer("char", alphabet=ALPHABET)
        wanted = SamplingSettings(1.0, LENGTH)
        sampler = Sampler(engine, policy, tokenizer, Verifiers(), wanted, max_prompt_length=4)
        source = RolloutSource(sampler, PromptStream(Letters()), config.rl, seed=0)
        timers = Timers()
        source.sampler.update(timers)
        timers.pop()
        policy.version += 1
        server.pace = sampling / LENGTH
        start = time.perf_counter()
        for step in range(steps):
            source.generate(timers, steps_left=steps - step)
            time.sleep(training)
            policy.version += 1
        seconds = time.perf_counter() - start
        engine.close()
        server.close()
    return seconds, timers.pop()["time/update_weights"] / steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
