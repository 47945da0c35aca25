"""The GPU check's command, rehearsed: its own processes, results and table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.e2e.conftest import ROOT
from tools.gpu.results import FAILED


def test_a_rehearsal_of_the_first_sections_passes(tmp_path):
    ended = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "gpu_check.py"),
            "--rehearse",
            "--only=environment:layers,correct:dense,memory",
            f"--out={tmp_path}",
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    sections = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert [section["name"] for section in sections] == ["environment", "correct", "memory"]
    rows = {row["part"]: row for section in sections for row in section["rows"]}
    assert FAILED not in {row["status"] for row in rows.values()}
    assert set(rows["dense"]["numbers"]) >= {"loss", "lambda", "gradient"}
    for way in ("2 drafts", "2 drafts in pages"):
        assert rows[f"dense: {way}"]["numbers"]["tokens"] > 0
    assert ended.stdout.splitlines()[-1].startswith("4 ok, 1 skipped")
