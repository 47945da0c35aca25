"""What the command line says of itself, before any command runs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from megatron_occ import __version__, cli
from megatron_occ.cli import main
from megatron_occ.commands.convert import main as convert

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "pretrain", "rl", "eval", "audit", "report", "compare", "convert")


def ended(*words: str) -> object:
    """Exit code of a command line that ends at once."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    return caught.value.code


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_a_name_that_no_file_has_is_told_in_a_sentence():
    told = ended("report", "a" * 300)
    assert told.startswith("megatron-occ: error: File name too long: aaa")
    assert told.endswith("Shorten it") and len(told) < 160
    with pytest.raises(OSError, match="File name too long"):
        main(["report", "a" * 300, "--debug"])


@pytest.mark.parametrize(("words", "code"), [((), 2), (("--help",), 0)])
def test_every_command_has_its_line(words, code, capsys):
    assert ended(*words) == code
    captured = capsys.readouterr()
    text = captured.out if words else captured.err
    assert "Pretraining and reinforcement learning" in text
    lines = text.partition("  command\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line.split()) > 3 for line in lines)


def test_the_version_names_what_results_depend_on(capsys, monkeypatch):
    assert ended("--version") == 0
    first, second, third = capsys.readouterr().out.strip().split(", ")
    assert (first, third) == (f"megatron-occ {__version__}", f"torch {version('torch')}")
    assert second.startswith("megatron-core ")

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", missing)
    assert ended("--version") == 0
    assert "torch not installed as a package" in " ".join(capsys.readouterr().out.split())


def test_the_package_has_one_version():
    assert f'version="{__version__}"' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("words", [["--version"], ["demo", "--help"], ["convert", "--help"]])
def test_it_answers_without_torch(words):
    code = (
        "import sys\nfrom megatron_occ.cli import main\n"
        f"try:\n    main({words})\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


def test_the_help_of_the_demo_shows_no_values_but_where_they_are(capsys):
    assert ended("rl", "--help") == 0
    assert "  rl.steps=100" in capsys.readouterr().out
    assert ended("demo", "--help") == 0
    text = capsys.readouterr().out
    assert "rl.steps=100" not in text and "pretrain.steps=" not in text
    assert "those of conf/demo.yaml" in text and "demo --print-config" in text
    assert "yaml file, in place of conf/demo.yaml" in text
    main(["demo", "--print-config"])
    assert "run_dir: runs/demo\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["import", "export", "inspect"])
def test_debug_shows_the_traceback_of_a_conversion(command, tmp_path):
    words = [command, str(tmp_path)] + ([] if command == "inspect" else [str(tmp_path / "to")])
    with pytest.raises(SystemExit, match="megatron-occ convert: error:"):
        convert(words)
    with pytest.raises(ValueError, match="it has no config"):
        convert([*words, "--debug"])
