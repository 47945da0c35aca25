"""What other work on the machine costs a small CPU run: seconds of an RL step, quiet and busy.

Runs of the demo's model, a few RL steps each, alone and beside one busy process for each of
``--busy``; settings of threads and rounds are interleaved, and the table gives medians over all
steps but a run's first. Needs a machine with nothing else on it, and a checkpoint of the demo's
pretraining.

    python benchmarks/busy_machine.py runs/demo/checkpoints/pretrain/step_000425 [--rounds 3]
        [--busy 1] [--env NAME:KEY=VALUE,...]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVERRIDES = ("rl.validation.every=0", "rl.validation.problems=16", "rl.save_every=100")


def step_seconds(checkpoint: Path, steps: int, environment: dict[str, str]) -> list[float]:
    """Wall-clock seconds of each RL step but the first of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["rl", "--config", str(ROOT / "conf" / "demo.yaml"), f"rl.init_from={checkpoint}"]
        words += [f"run_dir={run}", f"rl.steps={steps}", *OVERRIDES]
        command = [sys.executable, "-m", "megatron_occ", *words]
        subprocess.run(
            command, check=True, cwd=ROOT, env=os.environ | environment, capture_output=True
        )
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["time/step"] for line in lines if line["phase"] == "rl"][1:]


def busy_process() -> subprocess.Popen:
    """One that computes all the time."""
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside a run")
    parser.add_argument("--env", action="append", default=[], help="a variant by its environment")
    options = parser.parse_args()
    variants: dict[str, dict[str, str]] = {"as it is": {}}
    for text in options.env:
        name, _, values = text.partition(":")
        variants[name] = dict(pair.split("=", 1) for pair in values.split(",") if pair)
    found: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, environment in variants.items():
            for busy in (False, True):
                with ExitStack() as stack:
                    for _ in range(options.busy if busy else 0):
                        stack.callback(stack.enter_context(busy_process()).kill)
                    found[name, busy] += step_seconds(
                        options.checkpoint, options.steps, environment
                    )
    print(f"{'':24}  quiet, s   busy, s   busy / quiet")
    for name in variants:
        quiet, busy = (statistics.median(found[name, flag]) for flag in (False, True))
        print(f"{name:24}  {quiet:8.2f}  {busy:8.2f}  {busy / quiet:13.2f}")


if __name__ == "__main__":
    main()
