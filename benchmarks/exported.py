"""Trained models after export, under transformers: the same tokens, the same drafts accepted.

    python -m benchmarks.exported [--run RUN_FOLDER]

1. The demo's model as a Hugging Face folder: greedy responses by transformers' ``generate`` and by
   our engine, token for token.
2. A model of GLM-4.5's kind (experts, partial rotary embedding, norms of queries and keys), trained
   on the demo's task: ``generate(use_mtp=True)`` on the folder, and the share of drafts that it
   accepts, against the share that our engine accepts.

The models are trained first where they are not there yet (two and eight minutes on one core).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.demo_model import CONFIG, DemoModel, build_model, demo_model
from benchmarks.peer_generate import PeerSampling, generate
from megatron_occ.convert.checkpoints import export_checkpoint
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.checkpoint_folder import list_checkpoints
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import shutdown
from megatron_occ.rollout import Generation, Request, SamplingSettings

GLM_RUN = Path("runs/benchmark_glm")
GLM = (
    "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 192, shared_ffn_hidden_size: 192, "
    "first_dense_layers: 1, score_function: sigmoid, expert_bias: true}",
    "model.qk_layernorm=true",
    "model.rotary_percent=0.5",
    "model.num_query_groups=2",
    "model.tie_embeddings=false",
    "mtp.num_layers=1",
)
PROMPTS, LENGTH = 200, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="folder of a finished demo, for part 1")
    options = parser.parse_args()
    demo = demo_model(options.run)
    _same_tokens(demo, _load_newest(demo, options.run or Path("runs/benchmark_model")), 50)
    shutdown()
    if not list_checkpoints(GLM_RUN / "checkpoints" / "pretrain"):
        command = [sys.executable, "-m", "megatron_occ", "pretrain", "--config", str(CONFIG)]
        subprocess.run([*command, f"run_dir={GLM_RUN}", *GLM], check=True)
    glm = build_model(GLM)
    _same_drafts(glm, _load_newest(glm, GLM_RUN))


def _load_newest(model: DemoModel, run: Path) -> Path:
    """The last checkpoint, of RL where there is one, with the model on its weights."""
    phases = [list_checkpoints(run / "checkpoints" / phase) for phase in ("rl", "pretrain")]
    _, newest = next(found for found in phases if found)[-1]
    load_weights(newest, model.actor, json.loads((newest / "meta.json").read_text()))
    return newest


def _ours(model: DemoModel, prompts: list[list[int]], drafts: int) -> Generation:
    engine = MegatronEngine(
        model.actor.inference_chunks,
        model.actor.layout,
        slots=64,
        speculation=Speculation(drafts),
    )
    sampling = SamplingSettings(0.0, LENGTH, stop_ids=model.stop_ids)
    return engine.generate([Request(prompt, 0) for prompt in prompts], sampling)


def _theirs(model: DemoModel, peer: Any, prompts: list[list[int]], mtp: bool) -> list[list[int]]:
    settings = PeerSampling(LENGTH, model.stop_ids, 0, temperature=0, use_mtp=mtp)
    return generate(peer, prompts, settings, 1).tokens


def _same_tokens(model: DemoModel, checkpoint: Path, count: int) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    prompts = model.prompts(count)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "hf"
        plan = export_checkpoint(checkpoint, target)
        peer = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        theirs = _theirs(model, peer, prompts, mtp=False)
    ours = _ours(model, prompts, 0).tokens
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(
        f"1. {plan.family.architecture}, read as {type(peer).__name__}: {equal} of {count} greedy "
        f"responses equal token for token, {sum(map(len, ours))} tokens"
    )


def _same_drafts(model: DemoModel, checkpoint: Path) -> None:
    from transformers import Glm4MoeForCausalLM

    prompts = model.prompts(PROMPTS)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "hf"
        export_checkpoint(checkpoint, target)
        peer = Glm4MoeForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        # where transformers looks for MTP layers; the class names those of the published sizes
        layers = model.config.model.num_layers
        peer._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}\."]
        with _counted() as matches:
            theirs = _theirs(model, peer, prompts, mtp=True)
    found = _ours(model, prompts, 1)
    equal = sum(a == b for a, b in zip(found.tokens, theirs, strict=True))
    drafts = found.drafts
    accepted, proposed = drafts.accepted[0], drafts.proposed[0]
    print(
        f"2. Glm4MoeForCausalLM with drafts: {equal} of {PROMPTS} responses equal; accepted by "
        f"generate(use_mtp=True) {sum(matches)} of {len(matches)} drafts "
        f"({sum(matches) / len(matches):.1%}), by our engine {accepted} of {proposed} "
        f"({accepted / proposed:.1%})"
    )


@contextmanager
def _counted() -> Iterator[list[bool]]:
    """List that fills with whether each draft of one token is the token that came.

    transformers' own number of matches leaves out a draft that ends a response.
    """
    from transformers.generation.candidate_generator import MTPCandidateGenerator

    found: list[bool] = []
    propose = MTPCandidateGenerator.get_candidates
    update = MTPCandidateGenerator.update_candidate_strategy
    drafted: list[torch.Tensor] = []

    def get_candidates(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, logits = propose(self, *args, **kwargs)
        drafted[:] = [] if logits is None else [ids]
        return ids, logits

    def note(self: Any, input_ids: torch.Tensor, scores: Any, num_matches: int) -> Any:
        for ids in drafted:
            place = ids.size(1) - 1
            found.append(bool(input_ids[0, place] == ids[0, place]))
        return update(self, input_ids, scores, num_matches)

    with (
        mock.patch.object(MTPCandidateGenerator, "get_candidates", get_candidates),
        mock.patch.object(MTPCandidateGenerator, "update_candidate_strategy", note),
    ):
        yield found


if __name__ == "__main__":
    main()
