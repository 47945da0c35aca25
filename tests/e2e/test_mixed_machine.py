"""A machine with TransformerEngine and apex installed and no CUDA device: nothing asks for them.

The stand-ins are found like the packages, and stop with an error of the loader when they are
imported, as the real ones do without CUDA's libraries: no ``except ImportError`` hides that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from megatron_occ.mcore.cpu.hidden import PACKAGES, hide_cuda_packages
from tests.e2e.conftest import ROOT, TINY, read_lines

SHORT = (
    *("pretrain.steps=1", "pretrain.optimizer.warmup_steps=0"),
    *("rl.steps=1", "rl.prompts_per_step=2", "rl.samples_per_prompt=4"),
    *("rl.rollout.max_response_length=3", "rl.validation.problems=1"),
)
KINDS = {
    "dense": ("precision=bf16", "parallel.distributed_optimizer=true", "recompute=full"),
    "latent experts": (
        *("model.mla.enabled=true", "model.moe.num_experts=4", "model.moe.ffn_hidden_size=16"),
        *("model.moe.shared_ffn_hidden_size=16", "model.moe.expert_bias=true"),
        "model.moe.score_function=sigmoid",
    ),
}
FIND = (
    "import {first}; from importlib.util import find_spec; "
    f"print([name for name in {PACKAGES} if find_spec(name) is not None])"
)


@pytest.fixture
def environment(tmp_path):
    """Of a process that finds a stand-in of each package."""
    folder = tmp_path / "installed"
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            f'raise OSError("libcuda.so.1: cannot open shared object file ({name})")\n'
        )
    path = os.pathsep.join((str(folder), str(ROOT)))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def python(environment, *arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_needs_none_of_them(environment, tmp_path, kind):
    folder = tmp_path / "run"
    arguments = ("-m", "megatron_occ", "rl", "--config", str(TINY), f"run_dir={folder}")
    done = python(environment, *arguments, "mtp.preset=occ", *SHORT, *KINDS[kind])
    assert done.returncode == 0, done.stderr
    assert f"no CUDA device: {', '.join(PACKAGES)} left out" in done.stderr
    assert {line["phase"] for line in read_lines(folder / "metrics.jsonl")} >= {"pretrain", "rl"}


def test_nobody_in_the_process_finds_them(environment):
    outside = python(environment, "-c", FIND.format(first="sys"))
    inside = python(environment, "-c", FIND.format(first="megatron_occ.mcore"))
    assert (outside.stdout.strip(), inside.stdout.strip()) == (str([*PACKAGES]), "[]")


def test_megatron_that_was_there_first_and_found_one_is_refused(monkeypatch):
    for name in ("megatron.core", "transformer_engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    message = "found transformer_engine, whose kernels .*: import megatron_occ.mcore first"
    with pytest.raises(ValueError, match=message):
        hide_cuda_packages()


def test_a_device_leaves_them_in_sight(monkeypatch):
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hide_cuda_packages()
    assert all(sys.modules[name] is not None for name in PACKAGES)
