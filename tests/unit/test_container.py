"""The recipe of the container installs what is pinned, and copies what that needs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "containers" / "Dockerfile").read_text()
specification = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
install = importlib.util.module_from_spec(specification)
specification.loader.exec_module(install)


def pin(file: str, name: str) -> str:
    return re.search(rf"(?m)^{name}==(\S+)$", (ROOT / file).read_text())[1]


def instructions() -> list[list[str]]:
    """Words of each instruction, continued lines joined, comments left out."""
    lines = [line for line in RECIPE.splitlines() if not line.startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def described(name: str) -> tuple[int, ...]:
    """Version of a part of the vendor's image, as its comment says."""
    return tuple(int(part) for part in re.search(rf"{name} (\d+)\.(\d+)", RECIPE).groups())


def test_the_pins_are_those_for_the_python_of_the_image():
    file = install.pins_for(described("Python"))
    assert file == "constraints-latest.txt"
    assert f"ARG MEGATRON_CORE={pin(file, 'megatron-core')}\n" in RECIPE


def test_the_torch_of_the_image_is_one_that_is_kept():
    assert install.OLDEST_TORCH <= described("torch") < install.FIRST_REFUSED_TORCH


def test_there_are_no_versions_but_those_of_the_constraints():
    installs = [words for words in instructions() if words[0] == "RUN"]
    text = " ".join(word for words in installs for word in words)
    assert "python tools/install.py" in text
    assert "pip install" not in text
    assert not re.search(r"==\s*\d|>=\s*\d", text)
    assert "env --unset=PIP_CONSTRAINT" in text


def test_what_the_installation_reads_is_copied():
    copied = {word for words in instructions() if words[0] == "COPY" for word in words[1:-1]}
    assert copied >= {"setup.py", "megatron_occ", "tools/install.py", *map(str, pins_files())}
    assert all((ROOT / name).exists() for name in copied)
    # before they are used
    order = [words[0] for words in instructions()]
    assert max(i for i, word in enumerate(order) if word == "COPY") < order.index("RUN")


def pins_files() -> list[str]:
    return [path.name for path in ROOT.glob("constraints*.txt")]
