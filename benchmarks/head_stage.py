"""The stage that trains the MTP head before RL: acceptance before and after, and after RL.

From one pretrained model of ``conf/demo.yaml``:

1. ``mtp.preset=head_only`` by ``soft_ce`` and by ``tv``, the same prompts, seeds and updates.
2. RL from the pretrained model and from the one whose head was trained by ``soft_ce``, with a head
   that is frozen in RL (``mtp.preset=none``) and with one that is trained on (``detach``). The
   policy's updates are the same in all four.

Of every checkpoint: tokens that a sequence gets of a trunk pass on 512 held-out problems, with 1, 2
and 3 drafts by ``coupled``, as ``benchmarks.rollout`` counts them, and with one by ``rejection``.

    python -m benchmarks.head_stage [--run RUN] [--out runs/head_stage] [--steps 100]
        [--rl-steps 60] [--json FILE]

``--run`` is a folder of ``megatron-occ pretrain``; without it one is pretrained first. What lies in
``--out`` already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.demo_model import CONFIG, DemoModel, demo_model
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.checkpoint_folder import list_checkpoints
from megatron_occ.mcore.inference.engine import MegatronEngine, Speculation
from megatron_occ.mcore.startup import shutdown
from megatron_occ.rollout import Request, SamplingSettings

PROMPTS, PLACES = 512, 64
SPECULATIONS = {f"{k} coupled": Speculation(k) for k in (1, 2, 3)}
SPECULATIONS["1 rejection"] = Speculation(1, coupled=False)
STAGE = (
    "mtp.preset=null",
    "rl.train_trunk=false",
    "mtp.trunk.signal=none",
    "mtp.trunk.coefficient=fixed",
    "mtp.head.weight=1.0",
    "mtp.head.states=rollout",
    "rl.optimizer.lr=1e-3",
    "rl.rollout.speculative.mode=off",
)
SIGNALS = ("soft_ce", "tv")
RL = ("rl.rollout.speculative.mode=off",)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/head_stage"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    demo = demo_model(options.run)
    folder = Path(demo.config.run_dir) if options.run is None else options.run
    _, start = list_checkpoints(folder / "checkpoints" / "pretrain")[-1]
    found = {"pretrained": start}
    for signal in SIGNALS:
        name = f"head stage, {signal}"
        settings = (*STAGE, f"mtp.head.signal={signal}", f"rl.steps={options.steps}")
        found[name] = train(options.out / signal, start, settings)
    for source, place in (("", start), ("head stage, ", found["head stage, soft_ce"])):
        for preset in ("none", "detach"):
            settings = (*RL, f"mtp.preset={preset}", f"rl.steps={options.rl_steps}")
            name = f"{source}RL, {preset}"
            target = options.out / f"{'stage_' if source else ''}{preset}"
            found[name] = train(target, place, settings)
    results = {name: measure(demo, checkpoint) for name, checkpoint in found.items()}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    shutdown()


def train(folder: Path, start: Path, settings: tuple[str, ...]) -> Path:
    """The last checkpoint of a run of ``rl`` from ``start``, made first if it is not there."""
    checkpoints = folder / "checkpoints" / "rl"
    if not list_checkpoints(checkpoints):
        command = [sys.executable, "-m", "megatron_occ", "rl", "--config", str(CONFIG)]
        values = (f"run_dir={folder}", f"rl.init_from={start}", "rl.save_every=1000", *settings)
        subprocess.run([*command, *values], check=True)
    return list_checkpoints(checkpoints)[-1][1]


def measure(demo: DemoModel, checkpoint: Path) -> dict[str, float]:
    """Acceptance lengths of a checkpoint."""
    load_weights(checkpoint, demo.actor, json.loads((checkpoint / "meta.json").read_text()))
    records = PromptStream(demo.task, 0, "validation").prompts_for_step(0, PROMPTS)
    requests = [Request(demo.tokenizer.encode(r.prompt), seed) for seed, r in enumerate(records)]
    sampling = SamplingSettings(1.0, demo.config.rl.rollout.max_response_length, demo.stop_ids)
    results = {}
    for name, speculation in SPECULATIONS.items():
        engine = MegatronEngine(
            demo.actor.inference_chunks, demo.actor.layout, slots=PLACES, speculation=speculation
        )
        generation = engine.generate(requests, sampling)
        results[name] = generation.drafts.acceptance_length
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """Text table, a row a checkpoint."""
    width = max(map(len, results))
    lines = [f"{'tokens a trunk pass':<{width}}" + "".join(f"{n:>13}" for n in SPECULATIONS)]
    for name, values in results.items():
        lines.append(f"{name:<{width}}" + "".join(f"{values[n]:13.3f}" for n in SPECULATIONS))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
