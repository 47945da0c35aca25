"""Section 2: tiny models in fp32, the device against the CPU, and engine against training.

A process that sees no CUDA device runs three updates of each model and leaves weights, metrics and
gradients; this one starts from the same weights. TF32 would round inputs to 10 bits of mantissa: it
is off in torch, and by ``NVIDIA_TF32_OVERRIDE`` in cuBLAS, which TransformerEngine calls itself.
In a rehearsal both are on the CPU, and the second side has packed micro-batches and another
number of threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.layout_cases import DENSE, MLA, MOE, PACKED, Case, read
from benchmarks.layout_runs import VOCABULARY, measure_and_keep, reference
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.capabilities import captures_cycles, uses_transformer_engine
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.inference.graphs import Capture, CUDACapture
from megatron_occ.rl.batch import MiniBatch, pad_sequences
from megatron_occ.rl.update import PolicyUpdater
from megatron_occ.rollout import Request, SamplingSettings
from tools.gpu.device import on_gpu, start
from tools.gpu.judging import judge_deviations, judge_engine
from tools.gpu.results import FAILED, INFO, OK, SKIPPED, Row
from tools.gpu.session import Session

_K = "mtp.num_layers=2"
MODELS = {
    "dense": (*DENSE, "model.num_query_groups=4", _K),
    "GQA + qk norm": (*DENSE, "model.qk_layernorm=true", _K),
    "MoE": (*MOE, _K),
    "MLA": (*MLA, _K),
}
PYTEST = "pytest -m gpu"
_RESPONSE, _REQUESTS = 12, 8
# tokens in the caches of four rows: a page of a GPU for each
PAGES = 1024
# seconds
_TESTS_NEED = 20.0


def measure(session: Session) -> None:
    """Rows of the section."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    wanted = [name for name in MODELS if session.wants(name)]
    with CPUSide(wanted, session) as cpu:
        for name in wanted:
            session.run(name, functools.partial(_compare, name, cpu))
    session.run(PYTEST, functools.partial(marked_tests, session), needs=_TESTS_NEED)


class CPUSide:
    """The process without a device.

    Args:
        names: of models.
        session: its folder takes what they leave.
    """

    def __init__(self, names: list[str], session: Session) -> None:
        self.names, self.session, self.folder = names, session, session.folder

    def __enter__(self) -> CPUSide:
        command = [sys.executable, "-m", "tools.gpu.correct", "--out", str(self.folder)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
        self._process = subprocess.Popen([*command, *self.names], env=environment)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def metrics(self, name: str) -> list[dict[str, float]]:
        """Of the updates of a model, once the process has come to its end.

        Raises:
            RuntimeError: it failed.
        subprocess.TimeoutExpired: the section's time is over.
        """
        if self._process.wait(timeout=self.session.remaining):
            raise RuntimeError(f"the CPU's side ended with {self._process.returncode}")
        return json.loads((self.folder / _folder(name) / "metrics.json").read_text())


def _folder(name: str) -> str:
    return name.replace(" ", "_")


def _compare(name: str, cpu: CPUSide) -> Iterator[Row]:
    if name == "MoE" and on_gpu() and not uses_transformer_engine():
        yield Row(name, SKIPPED, "no TransformerEngine, which Megatron's router needs on a GPU")
        return
    expected, folder = cpu.metrics(name), cpu.folder / _folder(name)
    layout = () if on_gpu() else PACKED
    start(read(MODELS[name], layout))
    found, actor = measure_and_keep(Case(name, 1, MODELS[name], layout), folder, expected)
    deviations = {
        "loss": found.loss,
        "lambda": found.coefficient,
        "gradient": found.gradient,
        "gradient norm": found.grad_norm,
        "weights": found.parameter,
    }
    yield judge_deviations(name, deviations, found.missing)
    captures = captures_cycles(actor.config, actor.layout.device)
    graphs = dict(capture=CUDACapture if captures else None)
    ways = {"0 drafts": {}, "2 drafts": {}, "2 drafts in pages": graphs | dict(cache_tokens=PAGES)}
    ways |= {"2 drafts as graphs": graphs} if captures else {}
    for way, how in ways.items():
        gap, tokens = engine_gap(actor, Speculation(int(way[0])), **how)
        yield judge_engine(f"{name}: {way}", gap, tokens)


def engine_gap(
    actor: MegatronGPTActor,
    speculation: Speculation,
    capture: Callable[[], Capture] | None = None,
    cache_tokens: int | None = None,
) -> tuple[float, int]:
    """Largest difference of the engine's log-probs to training's, and tokens that were compared."""
    engine = MegatronEngine(
        actor.inference_chunks,
        actor.layout,
        slots=4,
        cache_tokens=cache_tokens,
        speculation=speculation,
        capture=capture,
    )
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(0, VOCABULARY, (3 + row % 4,), generator=generator).tolist()
        for row in range(_REQUESTS)
    ]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    found = engine.generate(requests, SamplingSettings(1.0, _RESPONSE))
    width = max(map(len, prompts)) + _RESPONSE
    zeros, device = torch.zeros(_REQUESTS), actor.layout.device
    rows = pad_sequences(prompts, found.tokens, found.logprobs, zeros, 0, width, device)
    updater = PolicyUpdater(actor.config, actor)
    scored = updater.compute_logprobs([MiniBatch.padded(rows, _REQUESTS)])
    tokens = sum(map(len, found.tokens))
    return updater.logprob_gap(scored)["logprob_gap/max"], tokens


def marked_tests(session: Session) -> Iterator[Row]:
    """The tests that make sense on one GPU."""
    if not on_gpu() and not session.parts:
        yield Row(PYTEST, INFO, "left out of a rehearsal: every one of them would be skipped")
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/mcore"]
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=session.remaining
    )
    (session.folder / "pytest.log").write_text(ended.stdout + ended.stderr)
    last = (ended.stdout.strip().splitlines() or ["nothing said"])[-1]
    yield Row(PYTEST, OK if ended.returncode == 0 else FAILED, last.strip("= "))


def main() -> None:
    """The CPU's side of the models on the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    for name in options.names:
        folder = options.out / _folder(name)
        metrics = reference(MODELS[name], folder)
        (folder / "metrics.json").write_text(json.dumps(metrics))
    # Megatron's checkpoint writer leaves one behind
    for child in multiprocessing.active_children():
        child.kill()


if __name__ == "__main__":
    main()
