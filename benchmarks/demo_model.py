"""The demo's model after pretraining, for benchmarks that need one whose drafts mean something."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_occ.config import load_config
from megatron_occ.config.schema import Config
from megatron_occ.data.from_config import read_task, read_tokenizer
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tasks import Task
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.checkpoint_folder import list_checkpoints
from megatron_occ.mcore.startup import Layout, initialize
from megatron_occ.rl.calibration import regime_from

CONFIG = Path(__file__).resolve().parent.parent / "conf" / "demo.yaml"
FOLDER = Path("runs/benchmark_model")


@dataclass(frozen=True)
class DemoModel:
    """The actor on one process, and what its text is made of."""

    actor: MegatronGPTActor
    config: Config
    tokenizer: Tokenizer
    task: Task

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return (self.tokenizer.eos_id, *self.tokenizer.encode(self.task.stop))

    def prompts(self, count: int, first: int = 0) -> list[list[int]]:
        """Different prompts of the task."""
        stream = PromptStream(self.task, 0)
        records = [stream.prompts_for_step(first + index, 1)[0] for index in range(count)]
        return [self.tokenizer.encode(record.prompt) for record in records]


def demo_model(
    run: Path | None = None, overrides: Sequence[str] = (), *, updates: int = 10**6
) -> DemoModel:
    """The model of a run of ``conf/demo.yaml``.

    Args:
        run: folder with checkpoints of pretraining; None: ``runs/benchmark_model``, made first if
            it is not there (two minutes).
        overrides: of the configuration; they must leave the weights as they are.
        updates: length of the phase of the actor's optimizer.
    """
    folder = FOLDER if run is None else run
    if run is None and not list_checkpoints(folder / "checkpoints" / "pretrain"):
        command = [sys.executable, "-m", "megatron_occ", "pretrain", "--config", str(CONFIG)]
        subprocess.run([*command, f"run_dir={folder}"], check=True)
    model = build_model([f"run_dir={folder}", *overrides], updates=updates)
    _, newest = list_checkpoints(folder / "checkpoints" / "pretrain")[-1]
    load_weights(newest, model.actor, json.loads((newest / "meta.json").read_text()))
    return model


def build_model(overrides: Sequence[str] = (), *, updates: int = 10**6) -> DemoModel:
    """The same with random weights, those of the configuration's seed; see :func:`demo_model`."""
    config = load_config([CONFIG], overrides)
    layout = initialize(config)
    task = read_task(config)
    tokenizer = read_tokenizer(config, task)
    actor = _actor(config, tokenizer, layout, updates)
    return DemoModel(actor, config, tokenizer, task)


def demo_model_of(demo: DemoModel, layers: int) -> DemoModel:
    """Random weights of the same sizes, with another number of trunk layers, beside the first."""
    config = copy.deepcopy(demo.config)
    config.model.num_layers = layers
    actor = _actor(config, demo.tokenizer, demo.actor.layout, 1)
    return replace(demo, actor=actor, config=config)


def _actor(config: Config, tokenizer: Tokenizer, layout: Layout, updates: int) -> MegatronGPTActor:
    return MegatronGPTActor(
        config,
        tokenizer.vocab_size,
        layout,
        optimizer=config.rl.optimizer,
        total_updates=updates,
        train_head=regime_from(config.mtp).trains_head,
    )
