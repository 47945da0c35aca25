"""``make test``: every folder of tests is in a part, and a failure of either is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import test_all


def test_the_parts_are_all_tests():
    folders = {
        f"tests/{file.parent.name}" for file in Path(__file__).parents[1].glob("*/test_*.py")
    }
    # these need an environment of their own: make test-vllm
    folders.remove("tests/vllm")
    assert sorted(name for part in test_all.PARTS for name in part) == sorted(folders)


@pytest.mark.parametrize(
    ("first", "second", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (0, 5, 5), (0, "kill", 137)]
)
def test_the_status_is_that_of_the_worse_part(monkeypatch, capfd, first, second, status):
    def command(arguments):
        code = first if "tests/unit" in arguments else second
        end = "os.kill(os.getpid(), 9)" if code == "kill" else f"raise SystemExit({code})"
        shown = f"print({list(arguments)!r}, flush=True)"
        return [sys.executable, "-c", f"import os; {shown}; {end}"]

    monkeypatch.setattr(test_all, "command", command)
    assert test_all.main([]) == status
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "e2e        | ['tests/e2e']",
        "unit mcore | ['tests/unit', 'tests/mcore']",
    ]


def test_lines_are_shown_before_a_part_has_ended(monkeypatch, tmp_path):
    # each part waits for the other's line to be shown
    code = """if True:
        import pathlib, sys, time
        print(sys.argv[1], flush=True)
        while not pathlib.Path(sys.argv[2]).exists():
            time.sleep(0.01)
    """
    go = tmp_path / "go"
    told = []

    def show(name, lines):
        told.extend(next(iter(lines)).split())
        if len(told) == 2:
            go.touch()

    monkeypatch.setattr(test_all, "show", show)
    monkeypatch.setattr(
        test_all, "command", lambda given: [sys.executable, "-c", code, given[0], str(go)]
    )
    assert test_all.main([]) == 0
    assert sorted(told) == ["tests/e2e", "tests/unit"]


def test_arguments_go_to_one_process(monkeypatch):
    monkeypatch.setattr(test_all, "command", lambda given: ["test", *given])
    assert test_all.main(["a", "=", "a"]) == 0
    assert test_all.main(["a", "=", "b"]) == 1
