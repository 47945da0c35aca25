"""Section 4: tokens a second of whole updates, by the product's actor and updater, and memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.loss_memory import Inputs, Size, ours
from benchmarks.plain_trainer import PlainTrainer
from megatron_occ.config import load_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.capabilities import uses_transformer_engine
from megatron_occ.mcore.estimate.ranks import count_by_part
from megatron_occ.mcore.optimizer_state import main_parameters
from megatron_occ.rl.batch import RolloutBatch
from megatron_occ.rl.calibration import regime_from
from megatron_occ.rl.exchange import distribute
from megatron_occ.rl.update import PolicyUpdater, Update
from tools.gpu.device import (
    drawn_here,
    forget_peak,
    matrix_ceiling,
    on_gpu,
    peak_bytes,
    present_bytes,
    seconds,
    start,
)
from tools.gpu.judging import judge_aim
from tools.gpu.operations import update_operations
from tools.gpu.results import INFO, SKIPPED, Row
from tools.gpu.scales import TOY_TRAINING, TRAINING, TrainingScale
from tools.gpu.session import Session, free_memory

FP8 = {
    "fp8 current": ("fp8.format=hybrid", "fp8.scaling=current"),
    "fp8 block": ("fp8.format=e4m3", "fp8.scaling=block"),
    "fp8 delayed": ("fp8.format=hybrid", "fp8.scaling=delayed"),
}
DENSE, MOE, NONE = "dense bf16", "MoE bf16", "none bf16"
# seconds to build and time a model of this size
_NEEDS = 15.0


@dataclass(frozen=True)
class Speed:
    """Tokens, and floating-point operations that they need, a second; lambda of the last update."""

    tokens: float
    operations: float
    coefficient: float


class Side:
    """A policy and mini-batches for it.

    Args:
        scale: sizes.
        model: overrides of the configuration.
        preset: of MTP, with which the policy is built.
    """

    def __init__(self, scale: TrainingScale, model: Sequence[str], preset: str) -> None:
        self.scale, self.overrides = scale, scale.overrides(tuple(model))
        config = load_config([], [*self.overrides, *drawn_here(), f"mtp.preset={preset}"])
        self.actor = MegatronGPTActor(
            config,
            scale.vocabulary,
            start(config),
            optimizer=config.rl.optimizer,
            total_updates=10**6,
            train_head=regime_from(config.mtp).trains_head,
        )
        self.parts = count_by_part(self.actor.chunks)

    def update(self, preset: str, lengths: Sequence[int]) -> Callable[[], Update]:
        """An update of a regime, ready to be called many times."""
        config = load_config([], [*self.overrides, f"mtp.preset={preset}"])
        updater = PolicyUpdater(config, self.actor)
        rows = rollout(self.scale.vocabulary, lengths).map(lambda x: x.to(self.device))
        (mini,) = distribute(rows, [0] * len(lengths), config.rl, self.actor)
        (scored,) = updater.compute_logprobs([mini])
        return functools.partial(updater.run_update, scored)

    def speed(self, preset: str, lengths: Sequence[int]) -> Speed:
        """Of the updates of a regime; its lambda is there from the third, the first timed one."""
        update = self.update(preset, lengths)
        taken = seconds(update, rounds=self.scale.rounds)
        operations = update_operations(
            self.actor.config, self.parts, lengths, trains_head=preset != "none"
        )
        coefficient = update().metrics.get("lambda/mtp_1", 0.0)
        return Speed(sum(lengths) / taken, operations / taken, coefficient)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.actor.layout.device


def rollout(vocabulary: int, lengths: Sequence[int]) -> RolloutBatch:
    """Random rows of these lengths, an eighth of each a prompt."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths))
    mask = torch.zeros(shape)
    for row, length in enumerate(lengths):
        mask[row, length // 8 : length] = 1.0
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    advantages = torch.randn(len(lengths), generator=generator)
    return RolloutBatch(ids, mask, torch.zeros(shape), advantages)


def live_bytes(actor: MegatronGPTActor) -> dict[str, int]:
    """Bytes of what an actor holds, by use, under the names of the dry run."""
    buffers = [b for w in actor.wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
    parts = actor.optimizer.megatron.chained_optimizers
    pairs = [(part, *pair) for part in parts for pair in main_parameters(part)]
    moments = [part.optimizer.state[main] for part, _, main in pairs]
    return {
        "weights": sum(p.nbytes for chunk in actor.chunks for p in chunk.parameters()),
        "gradients, fp32": sum(buffer.grad_data.nbytes for buffer in buffers),
        "main weights, fp32": sum(main.nbytes for _, own, main in pairs if main is not own),
        "Adam moments, fp32": sum(
            state[name].nbytes for state in moments for name in ("exp_avg", "exp_avg_sq")
        ),
    }


def measure(session: Session) -> None:
    """Rows of the section."""
    start(load_config([], []))
    scale = TOY_TRAINING if session.rehearse else TRAINING
    speeds = Speeds(session, scale)
    session.run("ceiling", speeds.ceiling, always=True)
    session.run(DENSE, speeds.dense, needs=_NEEDS)
    parts = {name: functools.partial(speeds.fp8, name, FP8[name]) for name in FP8}
    parts |= {MOE: speeds.experts, NONE: speeds.without_mtp}
    # the most valuable first: there may be no time for the last
    for name in ("fp8 current", MOE, "fp8 block", NONE, "fp8 delayed"):
        session.run(name, parts[name], needs=_NEEDS)


class Speeds:
    """The parts of the section, which compare with each other.

    Args:
        session: under way.
        scale: sizes.
    """

    def __init__(self, session: Session, scale: TrainingScale) -> None:
        self.session, self.scale = session, scale
        self._ceiling = self._detach = float("nan")
        self._lengths = scale.mixed_lengths()

    def ceiling(self) -> Iterator[Row]:
        """Of matrix products."""
        self._ceiling = matrix_ceiling(torch.device("cuda" if on_gpu() else "cpu"))
        text = f"bf16 matrix products: {self._ceiling / 1e12:.3g} TFLOP/s"
        yield Row("ceiling", INFO, text, {"operations": self._ceiling})

    def dense(self) -> Iterator[Row]:
        """Regimes in turn, the vocabulary's share, and plain PyTorch."""
        judged, side = on_gpu(), Side(self.scale, self.scale.dense, "detach")
        detach = side.speed("detach", self._lengths)
        self._detach, share = detach.tokens, detach.operations / self._ceiling
        text = f"detach, {self._detach:,.0f} tokens/s"
        yield judge_aim(DENSE, "utilisation", share, text, judged=judged, tokens=self._detach)
        occ = side.speed("occ_decoupled", self._lengths)
        text = f"occ_decoupled, lambda {occ.coefficient:.1e}, {occ.tokens:,.0f} tokens/s"
        ratio = self._detach / occ.tokens
        yield judge_aim(DENSE, "occ_over_detach", ratio, text, judged=judged, occ=occ.tokens)
        yield self._vocabulary(side)
        yield self._memory(side, "detach", DENSE)
        yield from self.beside_plain(side)

    def without_mtp(self) -> Iterator[Row]:
        """The trunk alone."""
        found = Side(self.scale, self.scale.dense, "none").speed("none", self._lengths).tokens
        text = f"none, {found:,.0f} tokens/s: {found / self._base():.2f}x detach"
        yield Row(NONE, INFO, text, {"tokens": found})

    def fp8(self, name: str, settings: tuple[str, ...]) -> Iterator[Row]:
        """The dense model with FP8 products."""
        if not uses_transformer_engine():
            yield Row(name, SKIPPED, "no TransformerEngine on a CUDA device")
            return
        side = Side(self.scale, (*self.scale.dense, *settings), "detach")
        found = side.speed("detach", self._lengths).tokens
        text = f"detach, {found:,.0f} tokens/s"
        yield judge_aim(name, "fp8", found / self._base(), text, judged=True, tokens=found)
        yield self._memory(side, "detach", name)

    def experts(self) -> Iterator[Row]:
        """The mixture of experts."""
        if on_gpu() and not uses_transformer_engine():
            yield Row(MOE, SKIPPED, "no TransformerEngine, which Megatron's router needs on a GPU")
            return
        side = Side(self.scale, self.scale.moe, "detach")
        found = side.speed("detach", self._lengths)
        share = found.operations / self._ceiling
        text = f"detach, {found.tokens:,.0f} tokens/s: {share:.2f} of the matrix ceiling"
        yield Row(MOE, INFO, text, {"tokens": found.tokens, "utilisation": share})
        yield self._memory(side, "detach", MOE)

    def _base(self) -> float:
        """Tokens a second of the dense model, measured where its own part was not asked for."""
        if math.isnan(self._detach):
            side = Side(self.scale, self.scale.dense, "detach")
            self._detach = side.speed("detach", self._lengths).tokens
        return self._detach

    def _vocabulary(self, side: Side) -> Row:
        """Log-probs of all heads, forward and backward, by themselves."""
        config, tokens = side.actor.config, self.scale.micro_batch
        sizes = (tokens, self.scale.vocabulary, config.mtp.num_layers, config.model.hidden_size)
        inputs = Inputs(Size(*sizes))

        def once() -> None:
            inputs.forget()
            ours(inputs)

        share = seconds(once, rounds=self.scale.rounds) * self._detach / tokens
        return Row(DENSE, INFO, f"vocabulary: {share:.1%} of an update", {"vocabulary": share})

    def _memory(self, side: Side, preset: str, part: str) -> Row:
        """Peak of an update and what is there before it."""
        update = side.update(preset, self._lengths)
        update()
        free_memory()
        before = present_bytes()
        forget_peak()
        update()
        peak, live = peak_bytes(), live_bytes(side.actor)
        text = f"peak of {peak / 2**30:.2f} GiB, {sum(live.values()) / 2**30:.2f} of it resident"
        overrides = [*side.overrides, f"mtp.preset={preset}"]
        memory = {"peak": peak, "before": before, "live": live, "overrides": overrides}
        return Row(part, INFO, text, {"memory": memory, "vocabulary_size": self.scale.vocabulary})

    def beside_plain(self, side: Side) -> Iterator[Row]:
        """The same update, rows of the full length, in plain PyTorch."""
        lengths, scale = self.scale.full_lengths(), self.scale
        mine = side.speed("policy", lengths).tokens
        overrides = [*side.overrides, "mtp.preset=policy", "rl.micro_batch_tokens=null"]
        size = scale.micro_batch // scale.length
        config = load_config([], [*overrides, f"rl.micro_batch_size={size}"])
        weights = dict(side.actor.chunks[0].named_parameters())
        rows = rollout(scale.vocabulary, lengths)
        rows = replace(rows, old_logprobs=torch.full(rows.ids.shape, -10.0))
        plain = PlainTrainer(
            config, scale.vocabulary, weights, device=side.device, dtype=torch.bfloat16
        )
        plain.load(rows.map(lambda values: values.to(side.device)), (rows.ids, rows.response_mask))
        theirs = sum(lengths) / seconds(plain.update, rounds=scale.rounds)
        text = f"policy, full rows, {mine:,.0f} against {theirs:,.0f} tokens/s"
        yield judge_aim(DENSE, "plain_pytorch", mine / theirs, text, judged=on_gpu(), plain=theirs)
