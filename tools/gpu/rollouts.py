"""Section 5: the embedded engine, with a head that was trained for it, beside ``generate``.

The text is one that a model learns in seconds: each token follows from the last one in three cases
of four, and is drawn in the fourth. The head's drafts are then mostly right, as those of a trained
model are; that is what ``acceptance`` in the rows says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_generate import PeerSampling
from benchmarks.peer_weights import export_peer
from benchmarks.rollout import rate_of_engine, rate_of_peer
from megatron_occ.config import load_config
from megatron_occ.config.sizes import BEHIND_DRAFTS
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.estimate.ranks import count_by_part
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.inference.graphs import CUDACapture
from megatron_occ.rl.pretraining import PretrainTrainer
from megatron_occ.rollout import SamplingSettings
from tools.gpu.device import copy_bandwidth, drawn_here, on_gpu, start
from tools.gpu.judging import judge_aim
from tools.gpu.operations import cycle_bytes
from tools.gpu.results import FAILED, INFO, OK, Row
from tools.gpu.scales import ROLLOUTS, TOY_ROLLOUTS, RolloutScale
from tools.gpu.session import Session

IDS, FOLLOWS = 64, 0.75
# batches whose numbers have an aim: of `generate` and the floor, and of drafts
AIMED, DRAFTED = 64, 1
# seconds that a batch takes with all sides
_NEEDS = 12.0


class MarkovText:
    """Batches of text, see above; a ``Corpus``."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.next = torch.randperm(IDS, generator=generator)

    def batch(self, step: int, size: int, sequence_length: int) -> tuple[Tensor, Tensor]:
        """[size, length] ids and a mask of ones."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, IDS, (size, sequence_length), generator=generator)
        follows = torch.rand(size, sequence_length, generator=generator) < FOLLOWS
        for place in range(1, sequence_length):
            successor = self.next[ids[:, place - 1]]
            ids[:, place] = torch.where(follows[:, place], successor, ids[:, place])
        return ids, torch.ones(ids.shape)


def measure(session: Session) -> None:
    """Rows of the section."""
    scale = TOY_ROLLOUTS if session.rehearse else ROLLOUTS
    start(load_config([], []))
    rates = Rates(scale)
    session.run("bandwidth", rates.bandwidth, always=True)
    session.run("head", rates.train, always=True)
    with tempfile.TemporaryDirectory() as folder:
        rates.load_peer(Path(folder))
        for batch in scale.batches:
            session.run(f"batch {batch}", lambda b=batch: rates.batch(b), needs=_NEEDS)


class Rates:
    """A model, its copy in transformers, and rates of both.

    Args:
        scale: sizes.
    """

    def __init__(self, scale: RolloutScale) -> None:
        self.scale, self.text = scale, MarkovText()
        rows, length = scale.text
        overrides = (
            "precision=bf16",
            "mtp.num_layers=1",
            "model.init_std=0.02",
            f"pretrain.batch_size={rows}",
            f"pretrain.micro_batch_size={rows}",
            f"pretrain.sequence_length={length}",
            f"pretrain.steps={scale.updates}",
            "pretrain.optimizer.lr=6e-4",
            "pretrain.optimizer.warmup_steps=5",
        )
        self.config = load_config([], [*scale.model, *overrides, *drawn_here()])
        self.actor = MegatronGPTActor(
            self.config,
            scale.vocabulary,
            start(self.config),
            optimizer=self.config.pretrain.optimizer,
            total_updates=scale.updates,
        )
        self.parts = count_by_part(self.actor.chunks)
        self._bandwidth, self._peer = float("nan"), None

    def bandwidth(self) -> Iterator[Row]:
        """Of copies in the device's memory."""
        self._bandwidth = copy_bandwidth(self.actor.layout.device)
        text = f"copies read and write {self._bandwidth / 1e9:,.0f} GB/s"
        yield Row("bandwidth", INFO, text, {"bytes": self._bandwidth})

    def train(self) -> Iterator[Row]:
        """Pretrain, so that drafts mean something."""
        unused = dict.fromkeys(("validate", "logger", "save"))
        trainer = PretrainTrainer(self.config, self.actor, self.text, **unused)
        losses = []
        for _ in range(self.scale.updates):
            losses.append(trainer.run_step())
            trainer.step += 1
        ends = losses[0], losses[-1]
        first, last = ([line[f"loss/{head}"] for head in ("main", "mtp_1")] for line in ends)
        good = all(after < before for before, after in zip(first, last, strict=True))
        shown = [f"{b:.2f} to {a:.2f}" for b, a in zip(first, last, strict=True)]
        text = f"{self.scale.updates} updates: loss {shown[0]}, of the head {shown[1]}"
        yield Row("head", OK if good else FAILED, text, {"main": last[0], "mtp_1": last[1]})

    def load_peer(self, folder: Path) -> None:
        """The same weights in transformers, in bf16."""
        peer = export_peer(self.actor.chunks[0], self.config, folder, pad_id=0)
        self._peer = peer.to(self.actor.layout.device, torch.bfloat16)

    def batch(self, batch: int) -> Iterator[Row]:
        """Rates of a batch: no drafts, 1 and 2, ``generate``, and the floor."""
        scale, part = self.scale, f"batch {batch}"
        plain, _ = self._rate(batch, 0)
        yield Row(part, INFO, f"no drafts, {plain:,.0f} tokens/s", {"tokens": plain})
        yield self._floor(batch, plain)
        prompts = self._prompts(batch)
        rate_of_peer(self._peer, prompts, PeerSampling(8, (), 0), batch)
        theirs = rate_of_peer(self._peer, prompts, PeerSampling(scale.peer_response, (), 0), batch)
        judged = on_gpu() and batch == AIMED
        text = f"against {theirs:,.0f} tokens/s"
        yield judge_aim(part, "generate", plain / theirs, text, judged=judged, peer=theirs)
        for drafts in (1, 2):
            rate, acceptance = self._rate(batch, drafts)
            text = f"{drafts} drafts, {rate:,.0f} tokens/s, acceptance {acceptance:.2f}"
            judged = on_gpu() and batch == DRAFTED and drafts == 2
            numbers: dict[str, Any] = {f"drafts_{drafts}": rate, f"acceptance_{drafts}": acceptance}
            yield judge_aim(part, "drafts", rate / plain, text, judged=judged, **numbers)
        if batch == AIMED or not on_gpu():
            yield self._in_pages(batch, plain)

    def _in_pages(self, batch: int, plain: float) -> Row:
        """The rate without drafts where rows lie in pages, as many tokens as without."""
        row = self.scale.prompt + self.scale.response + BEHIND_DRAFTS
        rate, _ = self._rate(batch, 0, cache_tokens=batch * row)
        text = f"in pages, {rate:,.0f} tokens/s, {rate / plain:.2f} times the rate of whole rows"
        return Row(f"batch {batch}", INFO, text, {"tokens_in_pages": rate})

    def _floor(self, batch: int, rate: float) -> Row:
        context = self.scale.prompt + self.scale.response / 2
        cycle = cycle_bytes(self.config, self.parts, batch, context) / self._bandwidth
        floor = batch / cycle
        text = f"weights and cache could give {floor:,.0f} tokens/s"
        judged = on_gpu() and batch == AIMED
        part = f"batch {batch}"
        return judge_aim(part, "floor", floor / rate, text, judged=judged, memory_floor=floor)

    def _rate(
        self, batch: int, drafts: int, cache_tokens: int | None = None
    ) -> tuple[float, float]:
        """Tokens a second, and tokens that a sequence gets of a cycle."""
        engine = MegatronEngine(
            self.actor.inference_chunks,
            self.actor.layout,
            slots=batch,
            cache_tokens=cache_tokens,
            speculation=Speculation(drafts),
            capture=CUDACapture if on_gpu() else None,
        )
        prompts, acceptance = self._prompts(batch), {}
        rate_of_engine(engine, prompts, SamplingSettings(1.0, 8), 0)
        settings = SamplingSettings(1.0, self.scale.response)
        rate = rate_of_engine(engine, prompts, settings, 1, acceptance, "all")
        return rate, acceptance["all"]

    def _prompts(self, batch: int) -> list[list[int]]:
        return self.text.batch(10**6, batch, self.scale.prompt)[0].tolist()
