"""A whole GRPO step here and by TRL's ``GRPOTrainer``: the same weights, prompts and settings.

Both sides make the same number of responses to the same prompts and as many updates on them, with
the same loss, learning rate and length limit, and take turns in one process. They sample with other
random numbers; tokens and mean reward say that the work was the same. Two workloads:

even
    The demo's task with its pretrained model: responses of about the same length.
uneven
    Random weights of the same architecture over 32 ids of which only eos ends a response, so that
    lengths are about geometric with a mean near 32, and a limit of 192 that few reach: the longest
    of 512 responses has several times the mean, as in rollouts of reasoning models. The reward is
    a parity, so that half the responses succeed. Micro-batches are packed here.

``old from rollout`` is ``rl.old_logprobs=rollout``: no forward pass for old log-probs, which TRL
always makes. TRL trains the trunk alone, which is ``mtp.preset=none`` here; ``occ_decoupled``,
which trains more, is there for information. TRL's settings are in ``peer_trl.py``.

    python -m benchmarks.rl_step [--run RUN] [--rounds 5] [--threads 1] [--only even] [--json FILE]

``--run`` is a folder of ``megatron-occ demo`` or ``pretrain``; without it one is pretrained first.
TRL is not in the development environment: pip install trl==1.16.0 -c constraints.txt
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_model import DemoModel, build_model, demo_model
from benchmarks.peer_trl import TRLSettings, TRLStep, run_grpo
from benchmarks.peer_weights import export_peer
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tasks import ARITHMETIC_ALPHABET
from megatron_occ.mcore.inference.engine import MegatronEngine, speculation_from
from megatron_occ.mcore.startup import shutdown
from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.rewards import VerifierPool, VerifierResult
from megatron_occ.rl.rollouts import RolloutSource
from megatron_occ.rl.sampler import Sampler
from megatron_occ.rl.trainer import GRPOTrainer
from megatron_occ.rl.update import PolicyUpdater
from megatron_occ.rollout import SamplingSettings

COMMON = (
    "rl.optimizer.schedule=constant",
    "rl.optimizer.warmup_steps=0",
    "rl.rollout.log_samples=0",
)
SIDES = {
    "ours, none": ("mtp.preset=none",),
    "ours, none, old from rollout": ("mtp.preset=none", "rl.old_logprobs=rollout"),
    "ours, occ_decoupled": ("mtp.preset=occ_decoupled",),
}
EVEN = ("rl.micro_batch_size=128",)
# the task's characters and some of these, with two special ids 32 in all
LETTERS = "abcdefghijklmnopqrstuvwxyz"
IDS, LIMIT = 32, 192
UNEVEN = (
    "model.max_position_embeddings=256",
    f"rl.rollout.max_response_length={LIMIT}",
    "rl.rollout.batch_size=64",
    "rl.micro_batch_tokens=2048",
    # the work of a step must not change: lengths stay as they are
    "rl.optimizer.lr=1e-7",
)
PARTS = ("seconds", "generation", "reward", "logprobs", "training", "other")
TRL = "TRL"


class Parity:
    """1 for a response with an even number of characters; stands in for the verifier pool."""

    def score(self, items: Sequence[tuple[str, str, str]]) -> list[VerifierResult]:
        """Scores of (task, response, answer)."""
        return [VerifierResult(float(len(text) % 2 == 0), "ok") for _, text, _ in items]


class Silent:
    """Neither metrics, events nor responses are written."""

    def log(self, *_: Any) -> None: ...

    def event(self, *_: Any) -> None: ...

    def write(self, *_: Any) -> None: ...


@dataclass(frozen=True)
class Workload:
    """What both sides do.

    Args:
        sides: our models, by the name of the side, all with the same weights.
        stop_ids: end a response.
        verifiers: score responses.
    """

    sides: dict[str, DemoModel]
    stop_ids: tuple[int, ...]
    verifiers: Any

    @property
    def first(self) -> DemoModel:
        """One of them: prompts, settings and weights are those of all."""
        return next(iter(self.sides.values()))


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("even", "uneven"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    with VerifierPool() as pool:
        if options.only in (None, "even"):
            results["even"] = compare("even", even(options.run, pool), options.rounds)
        if options.only in (None, "uneven"):
            results["uneven"] = compare("uneven", uneven(), options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    shutdown()


def even(run: Path | None, pool: VerifierPool) -> Workload:
    """The demo's."""
    sides = {
        name: demo_model(run, [*COMMON, *EVEN, *overrides]) for name, overrides in SIDES.items()
    }
    return Workload(sides, next(iter(sides.values())).stop_ids, pool)


def uneven() -> Workload:
    """Random weights, long-tailed lengths."""
    sides = {name: random_model(overrides) for name, overrides in SIDES.items()}
    eos = next(iter(sides.values())).tokenizer.eos_id
    return Workload(sides, (eos,), Parity())


def random_model(overrides: Sequence[str]) -> DemoModel:
    """The demo's architecture before any training, with more characters."""
    characters = ARITHMETIC_ALPHABET + LETTERS
    alphabet = characters[: IDS - 2]
    return build_model([f"tokenizer.alphabet={json.dumps(alphabet)}", *COMMON, *UNEVEN, *overrides])


def compare(title: str, work: Workload, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Steps of all sides, which take turns; the first round is not counted."""
    first = work.first
    rl = first.config.rl
    stream = PromptStream(first.task, 0)
    records = [
        record
        for step in range(rounds + 1)
        for record in stream.prompts_for_step(step, rl.prompts_per_step)
    ]
    ours = {name: OurSteps(model, work) for name, model in work.sides.items()}

    def reward(responses: list[str], answers: list[str]) -> list[float]:
        items = [(first.task.name, *pair) for pair in zip(responses, answers, strict=True)]
        return [result.score for result in work.verifiers.score(items)]

    with tempfile.TemporaryDirectory() as folder:
        peer = export_peer(
            first.actor.chunks[0],
            first.config,
            Path(folder),
            stop_ids=work.stop_ids,
            pad_id=first.tokenizer.pad_id,
        )
        theirs = run_grpo(
            peer,
            first.tokenizer,
            [record.prompt for record in records],
            [record.answer for record in records],
            reward,
            trl_settings(first),
            between=lambda _: [side.run() for side in ours.values()],
        )
    steps = {TRL: theirs, **{name: side.steps for name, side in ours.items()}}
    counted = {name: each[1:] for name, each in steps.items()}
    print_table(title, counted)
    return {name: [asdict(s) | {"other": s.other} for s in each] for name, each in counted.items()}


def trl_settings(model: DemoModel) -> TRLSettings:
    """TRL's words for the same step."""
    rl = model.config.rl
    return TRLSettings(
        prompts_per_step=rl.prompts_per_step,
        samples_per_prompt=rl.samples_per_prompt,
        updates=rl.mini_batches,
        max_new_tokens=rl.rollout.max_response_length,
        lr=rl.optimizer.lr,
        temperature=rl.rollout.temperature,
        betas=(rl.optimizer.beta1, rl.optimizer.beta2),
    )


class OurSteps:
    """Steps of this project's trainer on a model, timed as TRL's are."""

    def __init__(self, model: DemoModel, work: Workload) -> None:
        config, actor = model.config, model.actor
        rollout = config.rl.rollout
        engine = MegatronEngine(
            actor.inference_chunks,
            actor.layout,
            slots=rollout.batch_size,
            speculation=speculation_from(config),
        )
        sampling = SamplingSettings(
            rollout.temperature, rollout.max_response_length, tuple(work.stop_ids)
        )
        room = config.model.max_position_embeddings - rollout.max_response_length
        sampler = Sampler(engine, actor, model.tokenizer, work.verifiers, sampling, room)
        self.trainer = GRPOTrainer(
            config,
            PolicyUpdater(config, actor),
            RolloutSource(sampler, PromptStream(model.task, 0), config.rl, config.seed),
            validate=lambda: Validation({}, []),
            logger=Silent(),
            rollout_log=Silent(),
            save=lambda _: None,
        )
        self.steps: list[TRLStep] = []

    def run(self) -> None:
        """One step."""
        start = time.perf_counter()
        metrics = self.trainer.run_step()
        seconds = time.perf_counter() - start
        self.trainer.step += 1
        times = self.trainer.timers.pop()
        step = TRLStep(
            seconds=seconds,
            generation=times["time/rollout"],
            reward=times["time/reward"],
            logprobs=times["time/logprobs"],
            training=times["time/train"],
            tokens=int(metrics["rollout/tokens"]),
            mean_reward=metrics["reward/mean"],
        )
        self.steps.append(step)


def print_table(title: str, steps: dict[str, list[TRLStep]]) -> None:
    """Medians of seconds; medians of TRL's time by a side's in the same round."""
    print(f"\n{title}: seconds of a step and of its parts")
    columns = "".join(f"{name:>11}" for name in PARTS)
    print(f"   {'':<30}{columns}{'tokens':>9}{'reward':>8}{'TRL / it':>10}")
    for name, each in steps.items():
        medians = (statistics.median(getattr(s, part) for s in each) for part in PARTS)
        ratios = (t.seconds / s.seconds for t, s in zip(steps[TRL], each, strict=True))
        print(
            f"   {name:<30}{''.join(f'{value:>11.3f}' for value in medians)}"
            f"{statistics.mean(s.tokens for s in each):>9,.0f}"
            f"{statistics.mean(s.mean_reward for s in each):>8.3f}"
            f"{statistics.median(ratios):>10.2f}"
        )


if __name__ == "__main__":
    main()
