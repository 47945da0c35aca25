"""What a checkpoint costs: updates while one is written, and a large one there and back.

Pretraining updates of a small model, in one run; a checkpoint is begun every few of them and
written in the background. The table compares the updates during which it was written with the
others. Then a model of ``--gigabytes`` (weights and both moments of Adam) is written and read.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_cost.py [--updates 60] [--gigabytes 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from megatron_occ.config import load_config
from megatron_occ.config.identity import describe
from megatron_occ.config.schema import Config
from megatron_occ.losses.heads import Normalizers
from megatron_occ.losses.pretraining import PretrainLoss
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_checkpoint
from megatron_occ.mcore.checkpoint_folder import Keep, damage
from megatron_occ.mcore.checkpoint_writer import CheckpointWriter
from megatron_occ.mcore.startup import Layout, initialize, shutdown
from megatron_occ.rl.batch import head_masks

SMALL = ("model.hidden_size=512", "model.ffn_hidden_size=1536", "model.num_layers=6")
LARGE = ("model.hidden_size=1024", "model.ffn_hidden_size=1024", "model.num_layers=1")
EVERY = 10  # updates between checkpoints
BYTES = 12  # of a parameter with its moments, fp32
VOCABULARY, LENGTH, ROWS = 4096, 64, 4


def make_actor(config: Config, vocabulary: int, layout: Layout) -> MegatronGPTActor:
    """A model of random weights with the state of an optimizer that has made an update."""
    return MegatronGPTActor(
        config, vocabulary, layout, optimizer=config.pretrain.optimizer, total_updates=1000
    )


def make_writer(folder: Path, actor: MegatronGPTActor, config: Config) -> CheckpointWriter:
    """One that writes in the background and keeps the newest."""
    meta = describe(config, {"kind": "none"}, {})
    return CheckpointWriter(folder, actor, meta, keep=Keep(1), background=True)


def update(actor: MegatronGPTActor) -> None:
    """One update of pretraining on random ids."""
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    masks = head_masks(torch.ones_like(ids), actor.num_depths)
    loss, counts = PretrainLoss(0.1), Normalizers.from_counts(Normalizers.count(masks))
    batch = actor.micro_batch(ids, masks, passes=((True, True),))
    actor.get_loss_and_metrics([batch], lambda outputs, mask: loss(outputs, mask, counts))
    actor.finish_training_step()


def compare_updates(layout: Layout, updates: int, folder: Path) -> None:
    """Print seconds of an update with and without a checkpoint being written."""
    config = load_config([], SMALL)
    actor = make_actor(config, VOCABULARY, layout)
    writer = make_writer(folder, actor, config)
    alone, beside, begun = [], [], []
    for number in range(1, updates + 1):
        start = time.perf_counter()
        writer.poll()
        was_written = writer.is_writing
        update(actor)
        seconds = time.perf_counter() - start
        if number > 2:
            (beside if was_written else alone).append(seconds)
        if number % EVERY == 0:
            start = time.perf_counter()
            writer.save(number, {})
            begun.append(time.perf_counter() - start)
    writer.finish()
    size = sum(p.numel() for chunk in actor.chunks for p in chunk.parameters())
    usual, slow = statistics.median(alone), statistics.median(beside)
    print(f"{size / 1e6:.0f}M parameters, {size * BYTES / 1e9:.2f} GB a checkpoint")
    print(
        f"update alone {usual:.3f} s ({len(alone)}), while one is written {slow:.3f} s "
        f"({len(beside)}): {slow / usual:.2f} times; to begin one {statistics.median(begun):.3f} s"
    )


def there_and_back(layout: Layout, gigabytes: float, folder: Path) -> None:
    """Print seconds to begin, write, verify and read a large checkpoint."""
    config = load_config([], LARGE)
    vocabulary = int(gigabytes * 1e9 / BYTES / config.model.hidden_size)
    actor = make_actor(config, vocabulary, layout)
    actor.finish_training_step()
    writer = make_writer(folder, actor, config)
    marks = [time.perf_counter()]
    path = writer.save(1, {})
    marks.append(time.perf_counter())
    writer.finish()
    marks.append(time.perf_counter())
    assert damage(path) is None
    marks.append(time.perf_counter())
    load_checkpoint(path, actor, describe(config, {"kind": "none"}, {}))
    marks.append(time.perf_counter())
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e9
    begin, write, verify, read = (b - a for a, b in pairwise(marks))
    print(
        f"{size:.2f} GB: begun in {begin:.1f} s, written {write:.1f} s later, checksums compared "
        f"in {verify:.1f} s, read in {read:.1f} s"
    )


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    options = parser.parse_args()
    layout = initialize(load_config([], []))
    with tempfile.TemporaryDirectory() as folder:
        compare_updates(layout, options.updates, Path(folder) / "small")
        there_and_back(layout, options.gigabytes, Path(folder) / "large")
    shutdown()


if __name__ == "__main__":
    main()
