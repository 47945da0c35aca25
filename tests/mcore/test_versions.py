"""An untested Megatron-Core is refused at start-up, before anything of it is imported."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_occ.mcore.versions import (
    ALLOW_UNTESTED,
    TESTED,
    check_version,
    check_written_by,
    installed_version,
    version_in,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("version", TESTED)
def test_tested_versions_pass_without_a_word(version, caplog):
    check_version(version, allow_untested=False)
    assert caplog.records == []


@pytest.mark.parametrize("version", ["0.16.0", "0.17.1", "0.19.2rc1", "0.20.0", "unknown"])
def test_another_version_is_refused_with_the_tested_ones_and_the_override(version):
    with pytest.raises(ValueError, match=r"with 0\.16\.1 and 0\.19\.2 only") as refusal:
        check_version(version, allow_untested=False)
    assert f"megatron-core {version} is installed" in str(refusal.value)
    assert "MEGATRON_OCC_ALLOW_UNTESTED=1" in str(refusal.value)


def test_an_allowed_version_goes_on_with_a_warning(caplog):
    check_version("0.17.1", allow_untested=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0.17.1 was not tested (0.16.1 and 0.19.2 were)" in caplog.text


def test_nothing_installed_is_no_version_to_allow():
    with pytest.raises(ValueError, match=r"not installed: pip install megatron-core==0\.19\.2"):
        check_version(None, allow_untested=True)


def test_the_version_is_that_of_the_package_without_a_git_commit():
    assert installed_version() == importlib.metadata.version("megatron-core").partition("+")[0]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = "rc0"\n', "0.20.0rc0"),
        ("MAJOR = 1\nMINOR = 2\nPATCH = 3\nPRE_RELEASE = ''\n", "1.2.3"),
        ("__version__ = '9.9.9'\n", "unknown"),
    ],
)
def test_version_of_a_checkout(tmp_path, text, version):
    file = tmp_path / "package_info.py"
    file.write_text(text)
    assert version_in(file) == version


def test_a_checkout_without_a_version_is_unknown(tmp_path):
    assert version_in(tmp_path / "package_info.py") == "unknown"


@pytest.mark.parametrize(("written", "installed"), [("0.19.2", "0.16.1"), ("0.20.0rc0", "0.19.2")])
def test_a_newer_versions_checkpoint_is_refused(written, installed):
    with pytest.raises(ValueError, match=f"install megatron-core {written} or newer"):
        check_written_by(written, installed)


@pytest.mark.parametrize("written", ["0.16.1", "0.19.0", "0.19.2", None, "unknown"])
def test_an_older_versions_checkpoint_may_be_loaded(written):
    check_written_by(written, "0.19.2")


@pytest.mark.parametrize("allowed", [False, True])
def test_start_up_imports_nothing_of_a_refused_version(tmp_path, allowed):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('Megatron was imported')\n")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 15\nPATCH = 0\nPRE_RELEASE = ''\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", "import megatron_occ.mcore.startup"],
        env={**os.environ, "PYTHONPATH": path, ALLOW_UNTESTED: str(int(allowed))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    refused = "megatron-core 0.15.0 is installed, and results were checked with" in result.stderr
    assert refused is not allowed
    assert ("Megatron was imported" in result.stderr) is allowed
