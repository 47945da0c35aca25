"""A server like vLLM that serves what it is given, by transformers: the exported weights.

``python -m tests.e2e.served_policy serve MODEL --port N ...`` stands in for the command ``vllm``.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import tempfile
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_occ.rollout.remote.arrival import opened, tensors_of
from megatron_occ.rollout.remote.manifest import read_manifest
from tests.unit.fake_servers import FakeVllm

# it tells of the MTP layer, which is not part of the model
logging.getLogger("transformers").setLevel(logging.ERROR)
# while a model is loaded, transformers puts a function that does nothing in place of the one that
# ties weights: two at a time leave it there, and later models of the process lack an output layer
LOADING = threading.Lock()


class ServedPolicy(FakeVllm):
    """No drafts; ``stuck`` after so many updates: later ones are answered, and not made.

    ``model`` is the folder that it was started with: weights out of memory come without its
    configuration.
    """

    def __init__(self, stuck: int | None = None, model: Path | None = None, **options) -> None:
        self.updates, self.stuck, self.folder = [], stuck, model
        self.model, self.model_lock = None, threading.Lock()
        super().__init__(**options)

    def load(self, folder: str) -> None:
        self.updates.append(Path(folder).name)
        if self.stuck is not None and len(self.updates) > self.stuck:
            return
        with self.model_lock, LOADING:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def fetch(self, manifest: str, source: str):
        self.held, wanted = "", read_manifest(manifest)
        with opened(wanted, source) as arrived, tempfile.TemporaryDirectory() as name:
            tensors = dict(tensors_of(wanted, arrived))
            shutil.copy(self.folder / "config.json", name)
            save_file(tensors, Path(name) / "model.safetensors", {"format": "pt"})
            self.load(name)
        self.held = wanted.identity
        given = {"trunk": len(tensors), "drafter": 0, "held": 0, "identity": self.held}
        return 200, {"results": [given]}

    @torch.no_grad()
    def rows(self, tokens: list[int]) -> torch.Tensor:
        """Log-probs [s, v] of what follows each token."""
        with self.model_lock:
            return self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def score(self, tokens):
        rows = self.rows(tokens)[:-1]
        return [row[token].item() for row, token in zip(rows, tokens[1:], strict=True)]

    def respond(self, prompt, seed, limit, stops, temperature):
        tokens, logprobs, tops = [], [], []
        while len(tokens) < limit and (not tokens or tokens[-1] not in stops):
            row = self.rows([*prompt, *tokens])[-1]
            draw = random.Random(f"{seed} {len(tokens)}").random()
            below = (row.exp().cumsum(0) < draw).sum().item()
            tokens.append(min(below, len(row) - 1))
            logprobs.append(row[tokens[-1]].item())
            tops.append(row.max().item())
        reason = "stop" if tokens[-1] in stops else "length"
        return tokens, logprobs, tops, reason, 0, 0


def main() -> None:
    """Serve until killed; options of ``vllm serve`` that are not known here are not read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    options, _ = parser.parse_known_args()
    server = ServedPolicy(model=options.model, address=("", options.port))
    server.load(str(options.model))
    server.thread.join()


if __name__ == "__main__":
    main()
