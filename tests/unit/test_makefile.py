"""``make clean`` removes what make itself made, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MADE = (
    ".venv/bin/python",
    ".venv-latest/bin/python",
    ".pytest_cache/README.md",
    ".ruff_cache/x",
    "build/lib/x.py",
    "megatron_occ.egg-info/PKG-INFO",
    "megatron_occ/data/__pycache__/x.pyc",
    *(f"{name}/__pycache__/x.pyc" for name in ("benchmarks", "examples", "tests", "tools")),
)
KEPT = (
    "runs/demo/metrics.jsonl",
    "mine/bin/python",
    "mine/lib/__pycache__/x.pyc",
    "megatron_occ/data/prompts.py",
    "notes.txt",
)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.mark.parametrize("words", [[], ["VENV=mine"], ["VENV=mine", "VENV_LATEST=mine"]])
def test_clean_leaves_results_and_environments_of_the_user(tmp_path, words):
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    for name in MADE + KEPT:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    subprocess.run(["make", "clean", *words], cwd=tmp_path, check=True, capture_output=True)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {*KEPT, "Makefile"}
    assert not (tmp_path / ".venv").exists()
