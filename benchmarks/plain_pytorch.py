"""What running on Megatron-Core costs: the same updates here and in plain PyTorch, side by side.

The plain model takes the weights of ours, and loss and every gradient are compared first, so that
both sides do the same mathematics. The updates are then interleaved in one run; the table gives
medians of seconds and the median of per-round ratios (with quartiles: the noise of the machine).
Ours also computes what is logged (entropy, agreement of the heads, calibration sums).

    python -m benchmarks.plain_pytorch [--rounds 20] [--size demo] [--json FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plain_model import from_megatron
from benchmarks.plain_trainer import PlainTrainer
from megatron_occ.config import load_config
from megatron_occ.config.schema import Config
from megatron_occ.losses.heads import HeadOutputs, JointTargets, LossReport, Normalizers
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.startup import Layout, initialize, shutdown
from megatron_occ.mcore.training import MicroBatch
from megatron_occ.rl.batch import MiniBatch, RolloutBatch, joint_targets
from megatron_occ.rl.pretraining import PretrainTrainer
from megatron_occ.rl.update import PolicyUpdater

CONFIG = Path(__file__).resolve().parent.parent / "conf" / "demo.yaml"
TOLERANCE = 1e-4
WARM_UP = 2
# one MTP pass and loss for trunk and head; a constant learning rate, so that both sides have it
COMMON = ("mtp.preset=policy", "rl.optimizer.warmup_steps=0", "rl.optimizer.schedule=constant")


@dataclass(frozen=True)
class Size:
    """Vocabulary and prompt length, and what else differs from the demo's configuration."""

    vocabulary: int
    prompt: int
    overrides: tuple[str, ...] = ()


SIZES = {
    "demo": Size(17, 7),
    "larger": Size(
        4096,
        32,
        (
            "model.hidden_size=256",
            "model.num_layers=4",
            "model.ffn_hidden_size=1024",
            "model.num_attention_heads=8",
            "model.num_query_groups=4",
            "model.max_position_embeddings=128",
            "model.init_std=0.02",
            "rl.rollout.max_response_length=96",
            "rl.prompts_per_step=16",
            "rl.micro_batch_size=32",
            "pretrain.batch_size=32",
            "pretrain.micro_batch_size=32",
            "pretrain.sequence_length=128",
        ),
    ),
}


class Ours:
    """Updates by this project's trainers."""

    def __init__(self, config: Config, size: Size, layout: Layout) -> None:
        torch.manual_seed(0)
        self.actor = MegatronGPTActor(
            config, size.vocabulary, layout, optimizer=config.rl.optimizer, total_updates=10**6
        )
        self.updater = PolicyUpdater(config, self.actor)
        unused = dict.fromkeys(("validate", "logger", "save"))
        self.pretrainer = PretrainTrainer(config, self.actor, None, **unused)

    def scored(self, batch: RolloutBatch) -> RolloutBatch:
        """The same batch with log-probs of the current policy."""
        (mini_batch,) = self.updater.compute_logprobs([self._cut(batch)])
        return mini_batch.rows

    def load(self, batch: RolloutBatch, pretraining: tuple[Tensor, Tensor]) -> None:
        """Take the data; ``pretraining`` are ids and token mask [b, s]."""
        depths = self.actor.num_depths
        self.mini_batch = self._cut(batch)
        self.pretrainer.corpus = _Fixed(*pretraining)
        parts = [rows for rows, _ in self.mini_batch.micro_batches()]
        targets = [joint_targets(part, depths) for part in parts]
        counts = torch.stack([Normalizers.count(target.mask) for target in targets]).sum(0)
        self.normalizers = Normalizers.from_counts(counts)
        self.micro_batches: list[MicroBatch] = [
            self.actor.micro_batch(
                part.ids, target, passes=self.updater.loss.regime.passes, entropy=True
            )
            for part, target in zip(parts, targets, strict=True)
        ]

    def gradients(self) -> float:
        """Forward and backward of the RL loss; returns the loss, in units of a whole batch."""
        losses = []

        def loss(outputs: HeadOutputs, target: JointTargets) -> tuple[Tensor, LossReport]:
            value, report = self.updater.loss(outputs, target, self.normalizers)
            losses.append(value.detach())
            return value, report

        self.actor.get_loss_and_metrics(self.micro_batches, loss)
        return float(torch.stack(losses).sum())

    def update(self) -> None:
        """One RL update."""
        self.updater.run_update(self.mini_batch)

    def pretrain(self) -> None:
        """One pretraining update."""
        self.pretrainer.run_step()

    def _cut(self, batch: RolloutBatch) -> MiniBatch:
        return MiniBatch.padded(batch, self.updater.config.rl.micro_batch_size)


@dataclass(frozen=True)
class _Fixed:
    ids: Tensor
    mask: Tensor

    def batch(self, *_where: int) -> tuple[Tensor, Tensor]:
        return self.ids, self.mask


PARTS = {
    "forward + backward": "gradients",
    "RL update": "update",
    "pretraining update": "pretrain",
}


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    layout = initialize(load_config([CONFIG], options.overrides))
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds")
    results = {}
    for name in options.size or SIZES:
        size = SIZES[name]
        config = load_config([CONFIG], [*COMMON, *size.overrides, *options.overrides])
        ours, plain = _sides(config, size, layout)
        results[name] = {"largest_deviation": _compare(name, ours, plain)}
        results[name] |= _measure(name, ours, plain, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    shutdown()


def _sides(config: Config, size: Size, layout: Layout) -> tuple[Ours, PlainTrainer]:
    ours = Ours(config, size, layout)
    weights = dict(ours.actor.chunks[0].named_parameters())
    plain = PlainTrainer(config, size.vocabulary, weights)
    generator = torch.Generator().manual_seed(0)
    rl, pretrain = config.rl, config.pretrain
    rows = rl.prompts_per_step * rl.samples_per_prompt // rl.mini_batches
    shape = (rows, size.prompt + rl.rollout.max_response_length)
    ids = torch.randint(2, size.vocabulary, shape, generator=generator)
    mask = torch.zeros(shape)
    mask[:, size.prompt :] = 1.0
    advantages = torch.randn(rows, generator=generator)
    batch = ours.scored(RolloutBatch(ids, mask, torch.zeros(shape), advantages))
    # an older policy than the current one: some ratios are clipped
    noise = 0.2 * torch.randn(shape, generator=generator)
    batch = batch.with_logprobs(batch.old_logprobs + noise, None)
    shape = (pretrain.batch_size, pretrain.sequence_length)
    text = torch.randint(2, size.vocabulary, shape, generator=generator)
    for side in (ours, plain):
        side.load(batch, (text, torch.ones(shape)))
    return ours, plain


def _compare(name: str, ours: Ours, plain: PlainTrainer) -> float:
    """Largest deviation of loss and gradients, relative to each tensor's largest entry."""
    losses = [side.gradients() for side in (ours, plain)]
    found = {n: p.main_grad for n, p in ours.actor.chunks[0].named_parameters()}
    found = from_megatron(found, plain.config.model)
    deviations = {"loss": abs(losses[0] - losses[1]) / abs(losses[1])}
    for parameter_name, parameter in plain.model.named_parameters():
        expected = parameter.grad
        difference = (found.pop(parameter_name) - expected).abs().max()
        deviations[parameter_name] = float(difference / expected.abs().max())
    assert not found, f"compared with nothing: {sorted(found)}"
    where = max(deviations, key=deviations.__getitem__)
    largest = deviations[where]
    count = len(deviations) - 1
    print(f"{name}: loss and {count} gradients agree to {largest:.1e} (largest: {where})")
    if not largest <= TOLERANCE:
        raise SystemExit(f"{name}: {where} deviates by {largest:.1e}, more than {TOLERANCE:.0e}")
    return largest


def _measure(
    name: str, ours: Ours, plain: PlainTrainer, rounds: int
) -> dict[str, dict[str, float]]:
    seconds: dict[tuple[str, int], list[float]] = {}
    for round_number in range(rounds + WARM_UP):
        # who goes first changes from round to round
        order = ((0, ours), (1, plain))[:: 1 if round_number % 2 else -1]
        for part, method in PARTS.items():
            for key, side in order:
                start = time.perf_counter()
                getattr(side, method)()
                if round_number >= WARM_UP:
                    seconds.setdefault((part, key), []).append(time.perf_counter() - start)
    results = {part: _summary(seconds[part, 0], seconds[part, 1]) for part in PARTS}
    print(f"{'size':<8} {'part':<20} {'ours s':>8} {'plain s':>8} {'ratio':>6}  quartiles")
    for part, row in results.items():
        print(
            f"{name:<8} {part:<20} {row['ours']:>8.4f} {row['plain']:>8.4f} {row['ratio']:>6.2f}"
            f"  {row['ratio_low']:.2f} - {row['ratio_high']:.2f}"
        )
    return results


def _summary(ours: list[float], plain: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ours": statistics.median(ours),
        "plain": statistics.median(plain),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


if __name__ == "__main__":
    main()
