"""Import directions: who may import Megatron, who may import torch, and who whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_occ"
LIBRARY = ("losses", "rl", "rollout", "convert", "data", "audit", "compare")
ROOMS = (*LIBRARY, "config", "observe", "mcore")
# each may import those after it and every room
TOP = ("cli", "commands", "phases", "run")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import, write it out"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files(path: Path) -> list[Path]:
    """Python files below a folder; of a file, the file."""
    return [path] if path.is_file() else list(path.rglob("*.py"))


def offenders(folders: list[Path], forbidden: str) -> list[str]:
    """Files, those below folders too, that import ``forbidden`` or anything in it."""
    found = []
    for path in sorted({file for folder in folders for file in files(folder)}):
        names = imported(path)
        if any(name == forbidden or name.startswith(f"{forbidden}.") for name in names):
            found.append(str(path.relative_to(ROOT)))
    return found


def test_the_scan_finds_what_it_looks_for():
    inside = offenders([PACKAGE / "mcore"], "megatron")
    assert "megatron_occ/mcore/model.py" in inside
    assert len(inside) > 5
    assert "megatron_occ/run.py" in offenders([PACKAGE], "megatron_occ.mcore")


def test_only_mcore_imports_megatron():
    found = offenders([PACKAGE, ROOT / "examples", ROOT / "tools"], "megatron")
    assert [path for path in found if not path.startswith("megatron_occ/mcore/")] == []


def test_unit_tests_import_no_megatron():
    assert offenders([ROOT / "tests" / "unit"], "megatron") == []
    assert offenders([ROOT / "tests" / "unit"], "megatron_occ.mcore") == []


@pytest.mark.parametrize("room", LIBRARY)
def test_the_library_does_not_import_the_megatron_side(room):
    assert offenders([PACKAGE / room], "megatron_occ.mcore") == []


@pytest.mark.parametrize("module", TOP)
def test_the_top_is_imported_by_what_is_above_it_alone(module):
    below = [PACKAGE / room for room in ROOMS]
    for name in TOP[TOP.index(module) + 1 :]:
        path = PACKAGE / name
        below.append(path if path.is_dir() else path.with_suffix(".py"))
    assert offenders(below, f"megatron_occ.{module}") == []


def test_every_file_belongs_to_a_room_or_to_the_top():
    names = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert names == {*ROOMS, *TOP}


@pytest.mark.parametrize("other", ["rl", "rollout", "mcore", "data", "audit"])
def test_losses_import_no_other_room(other):
    assert offenders([PACKAGE / "losses"], f"megatron_occ.{other}") == []


@pytest.mark.parametrize("other", ["rl", "rollout", "convert", "data", "config"])
def test_the_audit_imports_losses_and_observe_alone(other):
    assert offenders([PACKAGE / "audit"], f"megatron_occ.{other}") == []


@pytest.mark.parametrize(
    "module", ["config", "observe", "audit.page", "audit.text", "compare.page", "commands", "cli"]
)
def test_importing_it_imports_no_torch(module):
    code = (
        f"import sys, megatron_occ.{module}\n"
        "print([m for m in ('torch', 'megatron.core', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
