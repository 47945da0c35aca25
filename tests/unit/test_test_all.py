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
    ("first", "second", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (0, 5, 5)]
)
def test_the_status_is_that_of_the_worse_part(monkeypatch, capfd, first, second, status):
    def command(arguments):
        code = first if "tests/unit" in arguments else second
        return [sys.executable, "-c", f"print({list(arguments)!r}); raise SystemExit({code})"]

    monkeypatch.setattr(test_all, "command", command)
    assert test_all.main([]) == status
    shown = capfd.readouterr().out
    assert shown.index("tests/mcore") < shown.index("['tests/e2e']")


def test_arguments_go_to_one_process(monkeypatch):
    monkeypatch.setattr(test_all, "command", lambda given: ["test", *given])
    assert test_all.main(["a", "=", "a"]) == 0
    assert test_all.main(["a", "=", "b"]) == 1
