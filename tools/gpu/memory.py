"""Section 6: memory that was measured before, against the estimate of ``--dry-run``.

The estimate counts a model on the meta device, which it does where no CUDA device is visible: in a
process of its own. What lies in tensors of their own (weights, gradients, optimizer) is compared
part by part on any device; activations are the rest of the peak, and are known on a GPU alone.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tools.gpu.judging import judge_aim, judge_live
from tools.gpu.results import INFO, SKIPPED, Row
from tools.gpu.runs import BASE, CONFIG, base_settings
from tools.gpu.session import Session

GIB = 2**30
Estimate = dict[str, dict[str, int]]


def measure(session: Session) -> None:
    """Rows of the section."""
    from tools.gpu.device import on_gpu

    models = {
        part: numbers
        for part, numbers in session.numbers_of("training").items()
        if "memory" in numbers
    }
    if not models:
        session.add(Row("training", SKIPPED, "the section training left no measurements"))
    for part, numbers in models.items():
        session.run(part, functools.partial(_compare, part, numbers, judged=on_gpu()))
    found = session.numbers_of("runs").get(BASE, {})
    session.run("runs", lambda: _runs(found, session.rehearse))


def estimated(files: list[str], overrides: list[str], vocabulary: int | None) -> Estimate:
    """The dry run's bytes by use, ``resident``, ``training`` and ``generation``."""
    asked = json.dumps({"files": files, "overrides": overrides, "vocabulary": vocabulary})
    ended = subprocess.run(
        [sys.executable, "-m", "tools.gpu.estimate", asked],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ended.stdout.splitlines()[-1])


def _compare(part: str, numbers: dict[str, Any], *, judged: bool) -> Iterator[Row]:
    memory = numbers["memory"]
    expected = estimated([], memory["overrides"], numbers["vocabulary_size"])
    yield judge_live(part, memory["live"], expected["resident"])
    training = sum(expected["training"].values())
    whole = sum(expected["resident"].values()) + training
    text = f"estimate of the update {whole / GIB:.2f} GiB"
    if memory["peak"]:
        rest = memory["peak"] - memory["before"]
        there = memory["before"] - sum(memory["live"].values())
        text += (
            f", measured {memory['peak'] / GIB:.2f}; activations and logits "
            f"{training / GIB:.2f}, measured {rest / GIB:.2f}; {there / GIB:+.2f} beside the model"
        )
        off = abs(memory["peak"] / whole - 1)
        yield judge_aim(part, "estimate", off, text, judged=judged)
    else:
        yield Row(part, INFO, f"{text}: a peak is measured on a GPU alone")


def _runs(found: dict[str, Any], rehearse: bool) -> Iterator[Row]:
    """A small run: what its kernels need beside is more than its model, so nothing is judged."""
    expected = estimated([str(CONFIG)], list(base_settings(rehearse)), None)
    turns = [sum(expected[turn].values()) for turn in ("training", "generation")]
    whole = sum(expected["resident"].values()) + max(turns)
    measured = found.get("peak", 0)
    shown = f"{measured / 2**20:.1f} MiB" if measured else "on a GPU alone"
    text = f"estimate of the bf16 run {whole / 2**20:.1f} MiB, measured {shown}"
    yield Row("runs", INFO, text, {"estimate": whole, "measured": measured})
