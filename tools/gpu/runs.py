"""Section 3: whole runs by the command line: bf16, FP8 by each scaling, and one that is resumed.

All runs go at once on a GPU, which they leave mostly idle. The resumed run is a copy of an
undisturbed one without its last checkpoint; a second undisturbed run tells whether kernels are
exact at all. Their drafts have a fixed length, since ``auto`` follows the clock.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from megatron_occ.config import load_config
from megatron_occ.mcore.capabilities import uses_transformer_engine
from megatron_occ.mcore.checkpoint_folder import list_checkpoints
from tools.compare_runs import compare
from tools.gpu.device import on_gpu
from tools.gpu.judging import judge_gap, judge_metrics, judge_resume, judge_rewards
from tools.gpu.results import FAILED, INFO, SKIPPED, Row
from tools.gpu.session import Session

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "conf" / "rl" / "tiny.yaml"
# FP8 by blocks wants widths in multiples of 128
WIDE = ("model.hidden_size=128", "model.ffn_hidden_size=256")
COMMON = (
    "precision=bf16",
    "mtp.preset=occ_decoupled",
    "rl.micro_batch_size=128",
    "rl.micro_batch_tokens=512",
    "rl.optimizer.schedule=constant",
)
FP8 = {
    "fp8 delayed": ("fp8.format=hybrid", "fp8.scaling=delayed"),
    "fp8 current": ("fp8.format=hybrid", "fp8.scaling=current"),
    "fp8 block": ("fp8.format=e4m3", "fp8.scaling=block"),
    # its logprob_gap is to be below that of the one before
    "fp8 block and rollouts": ("fp8.format=e4m3", "fp8.scaling=block", "rl.rollout.fp8=true"),
}
# memory of the optimizer: begun when the others are done, where time is left
_SPLIT = "parallel.distributed_optimizer=true"
SAVING = {
    "moments in bf16": (_SPLIT, "parallel.moments_dtype=bf16"),
    "moments on the host": (_SPLIT, "parallel.optimizer_offload=0.5"),
}
SAVING_NEEDS = 40.0
BASE, RESUME = "bf16", "resume"
RESUME_STEPS = 6
RESUMED = (
    f"rl.steps={RESUME_STEPS}",
    f"rl.save_every={RESUME_STEPS // 2}",
    "keep_checkpoints=2",
    "rl.rollout.speculative.mode=fixed",
)
# kernels of attention that add up in one order, and so do cuBLAS's
EXACT = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def base_settings(rehearse: bool) -> tuple[str, ...]:
    """Overrides of ``conf/rl/tiny.yaml`` for the bf16 run."""
    steps = 4 if rehearse else 20
    sizes = ("pretrain.steps=30",) if rehearse else (*WIDE, "pretrain.steps=120")
    rollout = ("rl.rollout.speculative.mode=auto", f"rl.save_every={steps // 2}")
    return (*COMMON, *sizes, *rollout, f"rl.steps={steps}")


def measure(session: Session) -> None:
    """Rows of the section."""
    settings = base_settings(session.rehearse)
    fp8 = [name for name in FP8 if session.wants(name)]
    with ThreadPoolExecutor(8 if on_gpu() else 2) as pool:
        start = functools.partial(pool.submit, run_command, session)
        base = start(BASE, settings)
        resumed = start("exact", (*settings, *RESUMED), EXACT)
        control = start("control", (*settings, *RESUMED), EXACT)
        others = {}
        if uses_transformer_engine():
            others = {name: start(_folder(name), (*settings, *FP8[name])) for name in fp8}
        session.run(BASE, lambda: _judged(BASE, base.result(), "bf16"))
        session.run(RESUME, lambda: _resume(session, settings, resumed, control))
        for name in fp8:
            if name in others:
                session.run(name, functools.partial(_beside, name, "fp8", others[name], base))
            else:
                session.add(Row(name, SKIPPED, "no TransformerEngine on a CUDA device"))
        for name in filter(session.wants, SAVING):
            if uses_transformer_engine():
                begin = functools.partial(start, _folder(name), (*settings, *SAVING[name]))
                judged = functools.partial(_begun_beside, name, begin, base)
                session.run(name, judged, needs=SAVING_NEEDS)
            else:
                session.add(Row(name, SKIPPED, "no TransformerEngine on a CUDA device"))


def run_command(
    session: Session,
    name: str,
    settings: Iterable[str],
    environment: dict[str, str] | None = None,
    *,
    resume: bool = False,
) -> Path:
    """A run of ``rl``; returns its folder.

    Args:
        session: under way.
        name: of the folder.
        settings: overrides of the configuration.
        environment: beside ours.
        resume: go on with what is there.

    Raises:
        RuntimeError: it failed, with the last line that it wrote.
        subprocess.TimeoutExpired: the section's time is over.
    """
    folder, log = session.folder / name, session.folder / f"{name}.log"
    command = [sys.executable, "-m", "tools.gpu.cli", str(session.folder / f"{name}.json")]
    command += ["rl", "--config", str(CONFIG), f"run_dir={folder}", *settings]
    command += ["--resume"] * resume
    # a TF32 override or debugging of another section is not handed on
    with log.open("a") as target:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            stdout=target,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            timeout=max(session.remaining, 1),
        )
    if ended.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        raise RuntimeError(f"{name}: exit {ended.returncode}: {lines[-1].strip()}")
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Of the metrics of a run; numbers that are not finite are written as words there."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    words = ("nan", "inf", "-inf")
    return [{k: float(v) if v in words else v for k, v in line.items()} for line in lines]


def rl_values(folder: Path, name: str) -> list[float]:
    """A metric of all RL steps."""
    return [line[name] for line in lines_of(folder) if line["phase"] == "rl"]


def _folder(name: str) -> str:
    return name.replace(" ", "_")


def _judged(name: str, folder: Path, precision: str) -> Iterator[Row]:
    steps = load_config([folder / "config.yaml"]).rl.steps
    yield judge_metrics(name, lines_of(folder), steps)
    gaps = (rl_values(folder, f"logprob_gap/{kind}") for kind in ("mean", "max"))
    yield judge_gap(name, precision, *gaps)
    peak = json.loads(folder.with_suffix(".json").read_text())["peak"]
    yield Row(name, INFO, f"peak of {peak / 2**20:.0f} MiB", {"peak": peak})


def _begun_beside(
    name: str, begin: Callable[[], Future[Path]], base: Future[Path]
) -> Iterator[Row]:
    yield from _beside(name, "bf16", begin(), base)


def _beside(name: str, precision: str, run: Future[Path], base: Future[Path]) -> Iterator[Row]:
    folder = run.result()
    yield from _judged(name, folder, precision)
    yield judge_rewards(name, *(rl_values(one, "reward/mean") for one in (folder, base.result())))


def _resume(
    session: Session, settings: tuple[str, ...], run: Future[Path], control: Future[Path]
) -> Iterator[Row]:
    whole, second = run.result(), control.result()
    resumed = session.folder / "resumed"
    shutil.copytree(whole, resumed)
    step, last = list_checkpoints(resumed / "checkpoints" / "rl")[-1]
    if step != RESUME_STEPS:
        yield Row(RESUME, FAILED, f"the last checkpoint is of step {step}, not {RESUME_STEPS}")
        return
    shutil.rmtree(last)
    run_command(session, "resumed", (*settings, *RESUMED), EXACT, resume=True)
    yield resume_row(whole, resumed, second)


def resume_row(whole: Path, resumed: Path, control: Path) -> Row:
    """Compare the folders of a run, of a resumed copy of it, and of a second undisturbed run."""
    with redirect_stdout(sys.stderr):
        is_same, control_is_same = (compare(other, whole, "rl") for other in (resumed, control))
    return judge_resume(RESUME, is_same=is_same, control_is_same=control_is_same)
